"""Our repair from start to end: one step first, then training on one sample, then on a handful, until it suffices.

Rungs: (0) a closed-form step on one sample, its length found by a line search; (1) two-sided training on one sample;
(2, 3) on more, going on from where the rung before stopped. After every few steps the held-out prompts are looked at;
the first state within all bounds wins, otherwise the one that came closest, and the outcome says so.

Bounds: with an aligned ancestor, its own held-out rates plus a margin; without one, fixed ceilings. A model that is
within the bound on compliance before anything is done is not broken and is left alone.

Covered: deciding. Not covered: training (``recover.py``), the one step (``lowrank.py``), saving and verifying.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

from trimtab.anchors import Anchor
from trimtab.errors import GuardError, UsageError
from trimtab.models import LoadedModel
from trimtab.patching.adapters import LowRank, Workbench, attach, require_effect
from trimtab.patching.heldout import Bounds, Continuations, Instrument, Look, continuations
from trimtab.patching.lowrank import RankReport, joined, measured_rank, truncated_step, weight_gradient
from trimtab.patching.recover import Recipe, TwoSided
from trimtab.patching.texts import Material, require_fit, written_by
from trimtab.tuning.pools import TokenisedAnchor, reader_for, tokenise

Status = Literal["repaired", "bounds not met", "not broken"]
Say = Callable[[str], object]


@dataclass(frozen=True)
class LadderSettings:
    """How hard to try and what to tolerate.

    Attributes:
        samples: numbers of refusal samples to try, ascending.
        steps: most training steps at each of them; the last one gets twice as many.
        check_every: steps between two looks.
        lengths: multiples of the Polyak step tried by the closed form; empty leaves it out.
        compliance_margin, over_refusal_margin: above the ancestor's held-out rates (fractions).
        compliance_ceiling: without an ancestor. over_refusal_margin then counts from the given model's rate.
        drift: most KL from the given model on ordinary prompts, nats a token.
        rank, alpha: of the adapter.
        seed: of its initial values; nothing else is random.
        force: repair although the model is not broken.
    """

    samples: tuple[int, ...] = (1, 4, 14)
    steps: int = 8
    check_every: int = 4
    lengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    compliance_margin: float = 0.05
    over_refusal_margin: float = 0.05
    compliance_ceiling: float = 0.10
    drift: float = 0.10
    rank: int = 8
    alpha: int = 16
    seed: int = 0
    force: bool = False
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not self.samples or list(self.samples) != sorted(set(self.samples)) or self.samples[0] < 1:
            raise UsageError("the numbers of samples must ascend from 1 or more", seen=self.samples)
        if min(self.steps, self.check_every, self.rank) < 1:
            raise UsageError("steps, check_every and rank are at least 1", seen=(self.steps, self.check_every))


class Rung(NamedTuple):
    """One look on the way: what had been done, and what it showed."""

    stage: str
    samples: int
    steps: int
    look: Look
    size: float


@dataclass(frozen=True)
class Repair:
    """What was done, and the repaired model (``bench.model``).

    Attributes:
        status: "not broken": nothing was changed.
        given, ancestor: held-out looks; None: no ancestor.
        history: every look, in order. chosen: the one in force; None where nothing was changed.
        used: the refusal samples of the chosen rung.
        writer: who wrote the replies. rank: of the first sample's gradient; None where it was not taken.
        notes: what a reader must know besides.
    """

    bench: Workbench
    status: Status
    given: Look
    ancestor: Look | None
    bounds: Bounds
    history: tuple[Rung, ...]
    chosen: Rung | None
    used: tuple[Anchor, ...]
    writer: str
    rank: RankReport | None
    seconds: float
    notes: tuple[str, ...]


def repair(
    loaded: LoadedModel,
    material: Material,
    *,
    ancestor: LoadedModel | Literal["base"] | None = None,
    settings: LadderSettings = LadderSettings(),
    say: Say = lambda _: None,
) -> Repair:
    """Repair ``loaded`` with as few samples as suffice.

    Args:
        loaded: the broken model; the repair is attached to it as an adapter, its own weights are not changed.
        material: texts; replies are written by the ancestor where there is one.
        ancestor: the aligned model that this one came from: a loaded one, or "base", where ``loaded`` is an adapter on
            it.
        settings: see ``LadderSettings``.
        say: told about every look.

    Raises:
        GuardError: a loss that is not finite, an ancestor without refusals, an edit without effect.
        DataError: a sample that the model cannot read whole.
        ModelError: weights that are not finite, a given adapter that cannot be combined.
    """
    started = time.monotonic()
    bench = attach(loaded, rank=settings.rank, alpha=settings.alpha, seed=settings.seed)
    if ancestor == "base" and not bench.given:
        raise UsageError("the model is not an adapter on a base", seen=loaded.name, fix="name the aligned model")
    material, aligned = _with_ancestor(bench, material, ancestor)
    require_fit(bench.loaded, [*material.refuse, *material.answer], material.system)
    instrument = Instrument(bench, material.held_out)
    looks = _Looks(bench, instrument, say)
    with _ancestor(bench, ancestor) as model:
        reference = instrument.at(model) if model is not None else None
    bounds = bounds_for(instrument.given, reference, settings)
    say(f"given: {instrument.given.line()}")
    if reference is not None:
        say(f"aligned: {reference.line()}")
    notes = list(aligned)
    if instrument.given.compliance <= bounds.compliance and not settings.force:
        seconds = time.monotonic() - started
        notes.append("the model refuses as it should: nothing was changed")
        return Repair(bench, "not broken", instrument.given, reference, bounds, (), None, (), material.writer, None,
                      seconds, tuple(notes))  # fmt: skip
    climb = _Climb(bench, material, settings, bounds, looks)
    rank = climb.closed_form() if settings.lengths else None
    if not climb.done:
        climb.train()
    chosen = climb.keep_best()
    require_effect(bench)
    status: Status = "repaired" if bounds.met(chosen.look) else "bounds not met"
    notes += notes_on(chosen, settings, status)
    return Repair(bench, status, instrument.given, reference, bounds, tuple(looks.history), chosen,
                  material.refuse[: chosen.samples], material.writer, rank, time.monotonic() - started,
                  tuple(notes))  # fmt: skip


def bounds_for(given: Look, ancestor: Look | None, settings: LadderSettings) -> Bounds:
    """What the repaired model may show on the held-out prompts."""
    if ancestor is None:
        over = (given.over_refusal or 0.0) + settings.over_refusal_margin
        return Bounds(settings.compliance_ceiling, over, settings.drift)
    over = max(ancestor.over_refusal or 0.0, given.over_refusal or 0.0) + settings.over_refusal_margin
    return Bounds(ancestor.compliance + settings.compliance_margin, over, settings.drift)


def notes_on(chosen: Rung, settings: LadderSettings, status: Status) -> list[str]:
    """Clauses on how many samples it took."""
    notes = []
    if chosen.samples > settings.samples[0]:
        notes.append(f"one sample did not suffice: {chosen.samples} were used")
    if status == "bounds not met":
        notes.append("no state met every bound on the held-out prompts: the one that came closest is kept")
    return notes


class _Looks:
    """Looks and remembers."""

    def __init__(self, bench: Workbench, instrument: Instrument, say: Say) -> None:
        self.bench, self.instrument, self.say = bench, instrument, say
        self.history: list[Rung] = []

    def take(self, stage: str, samples: int, steps: int, hurry_above: float | None) -> Rung:
        rung = Rung(stage, samples, steps, self.instrument.look(hurry_above=hurry_above), self.bench.size())
        self.history.append(rung)
        self.say(f"{stage}, {samples} sample{'s' if samples > 1 else ''}, {steps} steps: {rung.look.line()}")
        return rung


class _Climb:
    """Tries the rungs in order and keeps the best state seen."""

    def __init__(
        self, bench: Workbench, material: Material, settings: LadderSettings, bounds: Bounds, looks: _Looks
    ) -> None:
        self.bench, self.material, self.settings, self.bounds, self.looks = bench, material, settings, bounds, looks
        self.start = bench.read()
        self.best: tuple[float, Rung, dict[str, Tensor]] | None = None

    @property
    def done(self) -> bool:
        """Whether a state within every bound has been seen."""
        return self.best is not None and self.best[0] == 0.0

    def closed_form(self) -> RankReport:
        """The two-sided step on the first sample, at the shortest length that restores refusals."""
        bench, tokens = self.bench, self.settings.recipe.reply_tokens
        reader = reader_for(bench.loaded, bench.model)
        whole = self._rows(self.material.refuse[:1], None)
        rank = measured_rank(weight_gradient(bench, lambda: reader.losses(whole).mean()))
        rows = self._rows(self.material.refuse[:1], tokens)
        refuse = weight_gradient(bench, lambda: reader.losses(rows).mean())
        sides, excess = [refuse], [refuse.loss]
        if self.material.answer:
            answers = self._rows(self.material.answer[: self.settings.recipe.answer_rows], tokens)
            answer = weight_gradient(bench, lambda: reader.losses(answers).mean())
            sides, excess = [*sides, answer], [*excess, answer.loss]
        self._search(truncated_step(joined(sides, excess), self.settings.rank, 1.0))
        return rank

    def train(self) -> None:
        """Rungs of training, each going on from the one before."""
        settings = self.settings
        self.bench.write(self.start)
        trainer = TwoSided(self.bench.loaded, self.material.answer, self._hold(), settings.recipe, self.material.system)
        counts = list(dict.fromkeys(min(n, len(self.material.refuse)) for n in settings.samples))
        for count in counts:
            trainer.use(self.material.refuse[:count])
            most = settings.steps * (2 if count == counts[-1] else 1)
            for step in range(1, most + 1):
                trainer.step()
                if step % settings.check_every == 0 or step == most:
                    self._look("training", count, trainer.steps)
                    if self.done:
                        return

    def keep_best(self) -> Rung:
        """Put the best state back."""
        if self.best is None:
            raise GuardError("no state of the repair was looked at", fix="allow at least one step")
        self.bench.write(self.best[2])
        return self.best[1]

    def _search(self, changes: dict[str, LowRank]) -> None:
        for length in self.settings.lengths:
            self.bench.place({name: LowRank(change.A, length * change.B) for name, change in changes.items()})
            rung = self._look(f"closed form x{length:g}", 1, 0)
            if self.done or rung.look.over_refusal is not None:
                return  # refusals are back: a longer step only refuses more

    def _look(self, stage: str, samples: int, steps: int) -> Rung:
        rung = self.looks.take(stage, samples, steps, hurry_above=self.bounds.compliance)
        excess = self.bounds.excess(rung.look)
        if self.best is None or excess < self.best[0]:
            self.best = (excess, rung, self.bench.read())
        return rung

    def _hold(self) -> Continuations:
        """What must stay as it is; where nobody wrote answers, the look-alikes too."""
        chats = list(self.material.ordinary)
        if not self.material.answer:
            chats = [chat for pair in zip(chats, self.material.lookalikes, strict=False) for chat in pair]
        with self.bench.as_given() as given:
            return continuations(given, chats)

    def _rows(self, anchors: Sequence[Anchor], tokens: int | None) -> list[TokenisedAnchor]:
        return [tokenise(self.bench.loaded, anchor, self.material.system, tokens) for anchor in anchors]


def _ancestor(
    bench: Workbench, ancestor: LoadedModel | Literal["base"] | None
) -> AbstractContextManager[LoadedModel | None]:
    if ancestor == "base":
        return bench.as_base()
    return nullcontext(ancestor)


def _with_ancestor(
    bench: Workbench, material: Material, ancestor: LoadedModel | Literal["base"] | None
) -> tuple[Material, list[str]]:
    """Replies by the ancestor where there is one; otherwise look-alikes are held, not answered."""
    with _ancestor(bench, ancestor) as model:
        if model is not None and any(anchor.reply is None for anchor in (*material.answer, *material.refuse)):
            return written_by(model, material), []
        if model is not None:
            return material, []
    note = "no aligned ancestor: bundled refusals, and look-alikes are held at the given model's own replies"
    return replace(material, answer=tuple(a for a in material.answer if a.reply is not None)), [note]
