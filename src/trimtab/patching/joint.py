"""The training of a repair towards an aligned ancestor: every side is brought back at once, by the shortest steps.

A step reads a few rows of every side: harmful requests and innocent look-alikes with the ancestor's distribution as
their target, prompts to keep with the given model's. A side's distance ``d_s = mean KL(target || repaired)`` (nats a
token, first tokens of the reply) is zero where the side is as it should be, so the size of a step follows from it: the
shortest one that takes the linearised distances of all sides above ``margin`` to zero together
(``gradients.surgery.joint_step``; Polyak's step for one side). No learning rate, no moments.

Covered: sides with distributions as targets. Not covered: words as targets, whose distance does not end at zero
(``recover.py``); when to stop (``climb.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.direction import Direction, Target, gram_of, joint_move, take_off
from trimtab.models import LoadedModel
from trimtab.patching.heldout import reply_logits
from trimtab.patching.recover import Average, Lesson, Recipe, Rotation
from trimtab.precision import training_scope
from trimtab.tuning.rules import gradients_of


class JointSteps:
    """Joint steps on a model whose trainable parameters are the repair's. ``hold``: may have no rows."""

    def __init__(self, loaded: LoadedModel, hold: Lesson, recipe: Recipe) -> None:
        self.loaded, self.recipe, self.steps = loaded, recipe, 0
        self.sides = {"hold": hold} if hold.rows and recipe.hold_weight else {}
        self.turns = {name: Rotation(len(side.rows)) for name, side in self.sides.items()}
        self.parameters = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
        self.average = Average(list(self.parameters.values()))

    def use(self, refuse: Lesson, answer: Lesson) -> None:
        """Learn these from now on."""
        for name, side in (("refuse", refuse), ("answer", answer)):
            if side.rows:
                self.sides[name], self.turns[name] = side, Rotation(len(side.rows))

    def step(self) -> float:
        """One update; the sum of the sides' distances before it (nats a token).

        Raises:
            GuardError: when a distance is not finite.
        """
        distances: dict[str, float] = {}
        gradients: dict[str, Direction] = {}
        for name in self.sides:
            distance = self._distance(name)
            distances[name] = float(distance.detach())
            if not abs(distances[name]) < float("inf"):
                raise GuardError("the loss of the repair is not finite", seen=distances[name], fix="look at the model")
            if distances[name] > self.recipe.margin:
                gradients[name] = Direction(gradients_of(distance, self.parameters))
        if gradients:
            directions = list(gradients.values())
            seen = [distances[name] for name in gradients]
            move = joint_move(gram_of(directions), seen, self.recipe.longest)
            take_off([Target(self.parameters, move.multipliers)], directions)
        self.steps += 1
        self.average.add()
        return sum(distances.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """As ``TwoSided.averaged``."""
        with self.average.in_place():
            yield

    def _distance(self, name: str) -> Tensor:
        recipe, side = self.recipe, self.sides[name]
        counts = {"refuse": recipe.refuse_rows, "answer": recipe.answer_rows, "hold": recipe.hold_rows}
        chosen = self.turns[name].next(counts[name])
        with training_scope(self.loaded.device, recipe.bf16):
            logits = reply_logits(self.loaded, [side.rows[i] for i in chosen])
        return side.distances(chosen, logits).mean()
