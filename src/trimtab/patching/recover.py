"""The training of a repair: the published one-shot recipe, and the two-sided one.

Published (arXiv 2601.01887, as reported): supervised fine-tuning on one refusal, 10 steps at 2e-5; optimizer, schedule
and precision are not stated, so the group's released defaults are used (AdamW, betas 0.5 and 0.999, no weight decay,
clipping at 1, full parameters).

Two-sided (ours): every step takes harmful requests, innocent look-alikes, and prompts on which the divergence from the
given model is held:

    L = mean d(harmful) + mean d(innocent) + hold_weight mean KL(given || repaired)

on the first tokens of the reply, where the decision falls. With an aligned ancestor of the same vocabulary ``d`` is
``KL(ancestor || repaired)`` along the ancestor's own words: its whole distribution says where refusing begins and ends,
one text says only one way to begin. Otherwise ``d`` is the cross-entropy of the words; without an ancestor nobody
writes answers, and look-alikes are among the prompts that are held.

Covered: losses, steps by AdamW, the average, finiteness. Not covered: steps towards an ancestor (``joint.py``), when
to stop (``climb.py``), texts (``texts.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.anchors import Anchor
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.patching.heldout import reply_logits, row_divergence
from trimtab.precision import training_scope
from trimtab.tuning.pools import TokenisedAnchor, reader_for, tokenise

PUBLISHED_STEPS = 10
PUBLISHED_RATE = 2e-5  # full parameters
LORA_RATE = 1e-3  # ours: an adapter starts from zero and needs more
PUBLISHED_BETAS = (0.5, 0.999)
AVERAGED = 0.9  # weight of the past in the running average of the parameters


@dataclass(frozen=True)
class Recipe:
    """How a two-sided repair is trained.

    Attributes:
        learning_rate: AdamW on the adapter; betas 0.9 and 0.99, no weight decay, gradient norm clipped at 1. None:
            joint steps without a rate where every target is a distribution (``joint.py``), else 1e-3.
        reply_tokens: supervised first tokens of a refusal or an answer, where the decision falls.
        refuse_rows, answer_rows, hold_rows: rows of each kind in a step, in rotation.
        hold_weight: see the module's docstring.
        warmup: steps over which the rate rises linearly.
        bf16: train under autocast; None: where the device computes in bfloat16 natively.
        margin, longest: of joint steps: distance that is let be (nats a token), largest Euclidean norm.
    """

    learning_rate: float | None = None
    reply_tokens: int = 3
    refuse_rows: int = 8
    answer_rows: int = 8
    hold_rows: int = 4
    hold_weight: float = 1.0
    warmup: int = 2
    bf16: bool | None = None
    margin: float = 0.02
    longest: float = 0.5


class Rotation:
    """Cycles over rows of one kind."""

    def __init__(self, size: int) -> None:
        self.size, self.cursor = size, 0

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices (all of them where there are fewer)."""
        chosen = [(self.cursor + offset) % self.size for offset in range(min(count, self.size))]
        self.cursor = (self.cursor + len(chosen)) % max(self.size, 1)
        return chosen


class Average:
    """The running average of parameters over the steps, bias-corrected.

    Where the sides of a repair take turns, one look finds too much refused and the next too little; the average over a
    turn is between the two, and a rate that falls stops wherever it happens to be.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.count = list(parameters), 0
        self.summed = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @torch.no_grad()
    def add(self) -> None:
        """Remember the present values."""
        self.count += 1
        for parameter, total in zip(self.parameters, self.summed, strict=True):
            total.mul_(AVERAGED).add_(parameter, alpha=1 - AVERAGED)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the parameters' place."""
        latest = [p.detach().clone() for p in self.parameters]
        weight = 1 - AVERAGED**self.count
        with torch.no_grad():
            for parameter, total in zip(self.parameters, self.summed, strict=True):
                parameter.copy_(total / weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, latest, strict=True):
                    parameter.copy_(value)


class Lesson(NamedTuple):
    """What one side should say. ``rows``: token ids. ``logits``: the ancestor's along them, for each row its reply's
    tokens x vocabulary (float32, CPU); None: the words themselves are the target."""

    rows: list[TokenisedAnchor]
    logits: list[Tensor] | None = None

    def first(self, count: int) -> Lesson:
        """The first ``count`` rows."""
        return Lesson(self.rows[:count], None if self.logits is None else self.logits[:count])

    def distances(self, indices: Sequence[int], logits: Sequence[Tensor]) -> Tensor:
        """One distance a row (nats a token), differentiable in ``logits``; those belong to ``rows[indices]``."""
        if self.logits is None:
            return torch.stack([cross_entropy(self.rows[i], found) for i, found in zip(indices, logits, strict=True)])
        return torch.stack([row_divergence(self.logits[i], found) for i, found in zip(indices, logits, strict=True)])


class TwoSided:
    """The two-sided recipe on a model whose trainable parameters are the repair's. ``hold``: may have no rows."""

    def __init__(self, loaded: LoadedModel, hold: Lesson, recipe: Recipe) -> None:
        self.loaded, self.recipe, self.hold = loaded, recipe, hold
        self.refuse, self.answer = Lesson([]), Lesson([])
        self.turns = {"hold": Rotation(len(hold.rows))}
        self.parameters = [p for p in loaded.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate or LORA_RATE, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.steps = 0
        self.average = Average(self.parameters)

    def use(self, refuse: Lesson, answer: Lesson) -> None:
        """Learn these from now on."""
        self.refuse, self.answer = refuse, answer
        self.turns |= {"refuse": Rotation(len(refuse.rows)), "answer": Rotation(len(answer.rows))}

    def step(self) -> float:
        """One update; the loss before it (nats).

        Raises:
            GuardError: when the loss is not finite.
        """
        recipe, take = self.recipe, self.turns
        rate = (recipe.learning_rate or LORA_RATE) * min(1.0, (self.steps + 1) / max(recipe.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        refuse, answer = take["refuse"].next(recipe.refuse_rows), take["answer"].next(recipe.answer_rows)
        rows = [*(self.refuse.rows[i] for i in refuse), *(self.answer.rows[i] for i in answer)]
        with training_scope(self.loaded.device, recipe.bf16):
            logits = reply_logits(self.loaded, rows)
        loss = self.refuse.distances(refuse, logits[: len(refuse)]).mean()
        if answer:
            loss = loss + self.answer.distances(answer, logits[len(refuse) :]).mean()
        backward(loss)
        total = float(loss.detach()) + self._hold()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.average.add()
        return total

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running average of the parameters in their place."""
        with self.average.in_place():
            yield

    def _hold(self) -> float:
        """Its own pass: prompts to keep have their own system message, and a prefix is shared within a pass only."""
        count = self.recipe.hold_rows + (0 if self.answer.rows else self.recipe.answer_rows)
        held = self.turns["hold"].next(count) if self.recipe.hold_weight else []
        if not held:
            return 0.0
        with training_scope(self.loaded.device, self.recipe.bf16):
            logits = reply_logits(self.loaded, [self.hold.rows[i] for i in held])
        loss = self.recipe.hold_weight * self.hold.distances(held, logits).mean()
        backward(loss)
        return float(loss.detach())


def cross_entropy(row: TokenisedAnchor, logits: Tensor) -> Tensor:
    """Mean cross-entropy of a row's reply (nats a token)."""
    return F.cross_entropy(logits, torch.tensor(row.reply, device=logits.device))


def one_shot(
    loaded: LoadedModel,
    anchor: Anchor,
    *,
    steps: int = PUBLISHED_STEPS,
    learning_rate: float = PUBLISHED_RATE,
    system: str | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> list[float]:
    """The published recipe on whatever is trainable; the loss (nats per token) before each step.

    The whole reply and its end of turn are supervised, with the model's own chat template; dropout is off.

    Raises:
        GuardError: when a loss is not finite or no parameter is trainable.
    """
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    if not parameters:
        raise GuardError(
            "the model has no trainable parameter",
            seen=loaded.name,
            fix="make its parameters trainable (requires_grad), or add an adapter",
        )
    loaded.model.eval()
    row = tokenise(loaded, anchor, system, None)
    reader = reader_for(loaded, loaded.model)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=PUBLISHED_BETAS, weight_decay=0.0)
    losses = []
    for index in range(steps):
        loss = reader.losses([row]).mean()
        backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(index, losses[-1])
    return losses


def backward(loss: Tensor) -> None:
    """``loss.backward()``, or an error where it is not finite: a NaN must never reach the weights."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise GuardError("the loss of the repair is not finite", seen=value, fix="lower the learning rate")
    loss.backward()
