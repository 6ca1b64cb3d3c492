"""Our repair from start to end: one step first, then training on one sample, then on a handful, until it suffices.

Rungs: a closed-form step on one sample, its length found by a line search; two-sided training on one sample; then on
more, each time from the given model (on all at once where one sample leaves most harmful requests complied with).
After every few steps the held-out prompts are looked at; the first state within all bounds wins, otherwise the one
that came closest, and the outcome says so.

Bounds: with an aligned ancestor, its own held-out rates plus a margin; without one, fixed ceilings. A model that is
within the bound on compliance before anything is done is not broken and is left alone.

Covered: bounds, the ancestor, what is said of the outcome. Not covered: the rungs (``climb.py``), saving and verifying.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from trimtab.anchors import Anchor
from trimtab.errors import UsageError
from trimtab.models import LoadedModel
from trimtab.patching.adapters import Workbench, attach, require_effect
from trimtab.patching.climb import Climb, LadderSettings, Looks, Rung, lessons_by
from trimtab.patching.heldout import Bounds, Instrument, Look
from trimtab.patching.lowrank import RankReport
from trimtab.patching.texts import Material, require_fit, written_by
from trimtab.patching.undo import Given

Status = Literal["repaired", "bounds not met", "not broken"]
Say = Callable[[str], object]


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

    Where this raises, nothing stays attached. Where nothing is broken, the empty repair is still attached.

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
        UsageError: "base" for a model that is not an adapter.
    """
    given = Given(loaded)
    bench = attach(loaded, rank=settings.rank, alpha=settings.alpha, seed=settings.seed, go_on=True)
    with given.unless_done(bench):
        return _repair(bench, material, ancestor, settings, say)


def _repair(
    bench: Workbench,
    material: Material,
    ancestor: LoadedModel | Literal["base"] | None,
    settings: LadderSettings,
    say: Say,
) -> Repair:
    started = time.monotonic()
    if ancestor == "base" and not bench.given:
        raise UsageError("the model is not an adapter on a base", seen=bench.loaded.name, fix="name the aligned model")
    instrument = Instrument(bench, material.held_out, bf16=settings.recipe.bf16)
    looks = Looks(bench, instrument, say)
    with _ancestor(bench, ancestor) as model:
        material, aligned = _with_ancestor(model, material)
        require_fit(bench.loaded, [*material.refuse, *material.answer], material.system)
        lessons = lessons_by(model, bench.loaded, material, settings.recipe)
        reference = instrument.at_ancestor(model) if model is not None else None
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
    climb = Climb(bench, material, lessons, settings, bounds, looks)
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
    notes, first = [], settings.samples[0]
    if chosen.samples > first:
        tried = "one sample" if first == 1 else f"{first} samples"
        notes.append(f"{tried} did not suffice: {chosen.samples} were used")
    if status == "bounds not met":
        notes.append("no state met every bound on the held-out prompts: the one that came closest is kept")
    return notes


def _ancestor(
    bench: Workbench, ancestor: LoadedModel | Literal["base"] | None
) -> AbstractContextManager[LoadedModel | None]:
    if ancestor == "base":
        return bench.as_base()
    return nullcontext(ancestor)


def _with_ancestor(model: LoadedModel | None, material: Material) -> tuple[Material, list[str]]:
    """Replies by the ancestor where there is one; otherwise look-alikes are held, not answered."""
    if model is not None and any(anchor.reply is None for anchor in (*material.answer, *material.refuse)):
        return written_by(model, material), []
    if model is not None:
        return material, []
    whose = "your own" if material.writer == "user" else "bundled"
    note = f"no aligned ancestor: {whose} refusals, and look-alikes are held at the given model's own replies"
    return replace(material, answer=tuple(a for a in material.answer if a.reply is not None)), [note]
