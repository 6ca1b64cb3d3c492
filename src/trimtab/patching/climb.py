"""The rungs of our repair, tried in order, and the best state seen on the way.

Covered: settings, what the two sides should say, the closed form, training on one sample, a handful, the pool.
Not covered: bounds, the ancestor, what is said of the outcome (``ladder.py``); the training itself (``recover.py``,
``joint.py``), the one step (``lowrank.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.anchors import Anchor
from trimtab.errors import GuardError, UsageError
from trimtab.models import LoadedModel
from trimtab.patching.adapters import LowRank, Workbench
from trimtab.patching.heldout import (
    Bounds,
    Instrument,
    Look,
    continuations,
    measured_logits,
    reply_logits,
    same_vocabulary,
)
from trimtab.patching.joint import JointSteps
from trimtab.patching.lowrank import RankReport, WeightGradient, joined, measured_rank, truncated_step, weight_gradient
from trimtab.patching.recover import Lesson, Recipe, TwoSided
from trimtab.patching.texts import Material
from trimtab.precision import adapters_train
from trimtab.tuning.pools import reader_for, tokenise

Say = Callable[[str], object]


@dataclass(frozen=True)
class LadderSettings:
    """How hard to try and what to tolerate.

    Attributes:
        samples: numbers of refusal samples to try, ascending.
        steps: most training steps at each of them but the last. last_steps: at the last.
        check_every: steps between two looks. first_check: steps before the first one on the last rung.
        lengths: multiples of the Polyak step among which the closed form chooses; empty leaves it out.
        hopeless: compliance after the first rung from which on the rungs between it and the last are left out.
        compliance_margin, over_refusal_margin: above the ancestor's held-out rates (fractions).
        compliance_ceiling: without an ancestor. over_refusal_margin then counts from the given model's rate.
        drift: most KL from the given model on ordinary prompts, nats a token.
        rank, alpha: of the adapter.
        seed: of its initial values; nothing else is random.
        force: repair although the model is not broken.
    """

    samples: tuple[int, ...] = (1, 6, 84)
    steps: int = 4
    last_steps: int = 36
    check_every: int = 12
    first_check: int = 24
    hopeless: float = 0.5
    lengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    compliance_margin: float = 0.05
    over_refusal_margin: float = 0.05
    compliance_ceiling: float = 0.10
    drift: float = 0.35
    rank: int = 8
    alpha: int = 16
    seed: int = 0
    force: bool = False
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not self.samples or list(self.samples) != sorted(set(self.samples)) or self.samples[0] < 1:
            raise UsageError(
                "the numbers of samples must ascend from 1 or more", seen=self.samples, fix="for instance 1 6 84"
            )
        if min(self.steps, self.last_steps, self.check_every, self.first_check, self.rank) < 1:
            seen = (self.steps, self.last_steps, self.check_every, self.first_check, self.rank)
            raise UsageError(
                "steps, last_steps, check_every, first_check and rank are at least 1",
                seen=seen,
                fix="raise what is below it",
            )


class Rung(NamedTuple):
    """One look on the way: what had been done, and what it showed."""

    stage: str
    samples: int
    steps: int
    look: Look
    size: float


class Lessons(NamedTuple):
    """What the two sides should say."""

    refuse: Lesson
    answer: Lesson


def lessons_by(
    teacher: LoadedModel | None, loaded: LoadedModel, material: Material, recipe: Recipe = Recipe()
) -> Lessons:
    """The first tokens of every reply, with the teacher's distribution along them where it can be had.

    It cannot be had without a teacher, where its vocabulary is another, and for refusals in the user's own words.
    """

    def lesson(anchors: Sequence[Anchor], words: bool) -> Lesson:
        rows = [tokenise(loaded, anchor, material.system, recipe.reply_tokens) for anchor in anchors]
        if words or teacher is None or not same_vocabulary(loaded, teacher):
            return Lesson(rows)
        asked = [
            tokenise(teacher, anchor, material.system, recipe.reply_tokens) for anchor in anchors
        ]  # its own template
        return Lesson(rows, measured_logits(teacher, asked, recipe.bf16))

    return Lessons(lesson(material.refuse, material.writer == "user"), lesson(material.answer, False))


class Looks:
    """Looks and remembers."""

    def __init__(self, bench: Workbench, instrument: Instrument, say: Say) -> None:
        self.bench, self.instrument, self.say = bench, instrument, say
        self.history: list[Rung] = []

    def take(self, stage: str, samples: int, steps: int, hurry: Bounds) -> Rung:
        rung = Rung(stage, samples, steps, self.instrument.look(hurry), self.bench.size())
        self.history.append(rung)
        self.say(f"{stage}, {samples} sample{'s' if samples > 1 else ''}, {steps} steps: {rung.look.line()}")
        return rung


class Climb:
    """Tries the rungs in order and keeps the best state seen."""

    def __init__(
        self,
        bench: Workbench,
        material: Material,
        lessons: Lessons,
        settings: LadderSettings,
        bounds: Bounds,
        looks: Looks,
    ) -> None:
        self.bench, self.material, self.lessons, self.looks = bench, material, lessons, looks
        self.settings, self.bounds = settings, bounds
        self.start = bench.read()
        self.best: tuple[float, Rung, dict[str, Tensor]] | None = None

    @property
    def done(self) -> bool:
        """Whether a state within every bound has been seen."""
        return self.best is not None and self.best[0] == 0.0

    def closed_form(self) -> RankReport:
        """The two-sided step on the first sample, at the length that brings both sides' own rows nearest."""
        bench = self.bench
        reader = reader_for(bench.loaded, bench.model)
        whole = [tokenise(bench.loaded, self.material.refuse[0], self.material.system, None)]
        rank = measured_rank(weight_gradient(bench, lambda: reader.losses(whole).mean()))
        sides = [self._gradient(self.lessons.refuse, 1)]
        if self.lessons.answer.rows:
            sides.append(self._gradient(self.lessons.answer, self.settings.recipe.answer_rows))
        self._search(truncated_step(joined(sides, [side.loss for side in sides]), self.settings.rank, 1.0))
        return rank

    def train(self) -> None:
        """Rungs of training, each from the given model, so that what is said of samples and steps is all there was.

        Going on from the rung before refused more innocent requests in the end (docs/results/patching.md).
        """
        settings, lessons, hold = self.settings, self.lessons, self._hold()
        counts = list(dict.fromkeys(min(n, len(lessons.refuse.rows)) for n in settings.samples))
        while counts:
            count = counts.pop(0)
            most = settings.steps if counts else settings.last_steps
            first = 0 if counts else min(settings.first_check, most)
            self.bench.write(self.start)
            trainer = self._trainer(hold)
            trainer.use(lessons.refuse.first(count), lessons.answer)
            looks = [n for n in range(first, most) if n and n % settings.check_every == 0]
            for before, step in pairwise((0, *looks, most)):
                with adapters_train(self.bench.model, self.bench.loaded.device, settings.recipe.bf16):
                    for _ in range(before, step):
                        trainer.step()
                with trainer.averaged():
                    rung = self._look("training", count, step)
                if self.done:
                    return
            if rung.look.compliance >= settings.hopeless:
                counts = counts[-1:]

    def _trainer(self, hold: Lesson) -> TwoSided | JointSteps:
        """Joint steps need distributions to end at, so an ancestor; a rate that was asked for is AdamW's."""
        recipe = self.settings.recipe
        known = all(side.logits is not None for side in self.lessons if side.rows)
        kind = JointSteps if known and self.lessons.answer.rows and recipe.learning_rate is None else TwoSided
        return kind(self.bench.loaded, hold, recipe)

    def keep_best(self) -> Rung:
        """Put the best state back."""
        if self.best is None:
            raise GuardError("no state of the repair was looked at", fix="allow at least one step")
        self.bench.write(self.best[2])
        return self.best[1]

    def _search(self, changes: dict[str, LowRank]) -> None:
        def place(length: float) -> None:
            self.bench.place({name: LowRank(change.A, length * change.B) for name, change in changes.items()})

        def distance(length: float) -> float:
            place(length)
            return self._distance()

        place(best := min(self.settings.lengths, key=distance))
        self._look(f"closed form x{best:g}", 1, 0)

    @torch.no_grad()
    def _distance(self) -> float:
        """Of the rows that the closed form is made from, both sides: mean loss a side, summed (nats a token)."""
        sides = [(self.lessons.refuse, 1), (self.lessons.answer, self.settings.recipe.answer_rows)]
        total = 0.0
        for lesson, count in sides:
            if rows := lesson.rows[:count]:
                logits = reply_logits(self.bench.loaded, rows)
                total += float(lesson.distances(range(len(rows)), logits).mean())
        return total

    def _look(self, stage: str, samples: int, steps: int) -> Rung:
        rung = self.looks.take(stage, samples, steps, self.bounds)
        excess = self.bounds.excess(rung.look)
        if self.best is None or excess < self.best[0]:
            self.best = (excess, rung, self.bench.read())
        return rung

    def _gradient(self, lesson: Lesson, count: int) -> WeightGradient:
        rows = lesson.rows[:count]
        indices = range(len(rows))
        return weight_gradient(
            self.bench, lambda: lesson.distances(indices, reply_logits(self.bench.loaded, rows)).mean()
        )

    def _hold(self) -> Lesson:
        """What must stay as the given model has it: the user's prompts; without an ancestor, which would say what
        ordinary prompts and look-alikes should get, these too."""
        chats = list(self.material.kept)
        if not self.material.answer:
            pairs = zip_longest(self.material.ordinary, self.material.lookalikes)
            chats += [chat for pair in pairs for chat in pair if chat is not None]
        if not chats:
            return Lesson([])
        with self.bench.as_given() as given:
            return Lesson(*continuations(given, chats, bf16=self.settings.recipe.bf16))
