"""The training of a repair: the published one-shot recipe, and the two-sided one.

Published (arXiv 2601.01887, as reported): supervised fine-tuning on one refusal, 10 steps at 2e-5; optimizer, schedule
and precision are not stated, so the group's released defaults are used (AdamW, betas 0.5 and 0.999, no weight decay,
clipping at 1, full parameters).

Two-sided (ours): every step takes refusals, innocent look-alikes with answers, and ordinary prompts on which the
divergence from the given model is held:

    L = mean CE(refusals) + answer_weight mean CE(answers) + hold_weight mean KL(given || repaired)

Without an ancestor nobody writes answers; look-alikes are then among the prompts that are held.

Covered: losses, steps, finiteness. Not covered: when to stop (``ladder.py``), texts (``texts.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.anchors import Anchor
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.patching.heldout import Continuations, reply_logits, row_divergence
from trimtab.tuning.pools import TokenisedAnchor, reader_for, tokenise

PUBLISHED_STEPS = 10
PUBLISHED_RATE = 2e-5  # full parameters
LORA_RATE = 1e-3  # ours: an adapter starts from zero and needs more
PUBLISHED_BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class Recipe:
    """How a two-sided repair is trained.

    Attributes:
        learning_rate: AdamW on the adapter; betas 0.9 and 0.99, no weight decay, gradient norm clipped at 1.
        reply_tokens: supervised first tokens of a refusal or an answer, where the decision falls.
        refuse_rows, answer_rows, hold_rows: rows of each kind in a step, in rotation.
        answer_weight, hold_weight: see the module's docstring.
        warmup: steps over which the rate rises linearly.
    """

    learning_rate: float = LORA_RATE
    reply_tokens: int = 6
    refuse_rows: int = 6
    answer_rows: int = 8
    hold_rows: int = 4
    answer_weight: float = 1.0
    hold_weight: float = 1.0
    warmup: int = 2


class Rotation:
    """Cycles over rows of one kind."""

    def __init__(self, size: int) -> None:
        self.size, self.cursor = size, 0

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices (all of them where there are fewer)."""
        chosen = [(self.cursor + offset) % self.size for offset in range(min(count, self.size))]
        self.cursor = (self.cursor + len(chosen)) % max(self.size, 1)
        return chosen


class TwoSided:
    """The two-sided recipe on a model whose trainable parameters are the repair's."""

    def __init__(
        self, loaded: LoadedModel, answers: Sequence[Anchor], hold: Continuations, recipe: Recipe, system: str | None
    ) -> None:
        self.loaded, self.recipe, self.system, self.hold = loaded, recipe, system, hold
        self.answers = [tokenise(loaded, anchor, system, recipe.reply_tokens) for anchor in answers]
        self.refusals: list[TokenisedAnchor] = []
        self.turns = {"refuse": Rotation(0), "answer": Rotation(len(self.answers)), "hold": Rotation(len(hold.rows))}
        self.parameters = [p for p in loaded.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.steps = 0

    def use(self, refusals: Sequence[Anchor]) -> None:
        """Learn these refusals from now on."""
        self.refusals = [tokenise(self.loaded, anchor, self.system, self.recipe.reply_tokens) for anchor in refusals]
        self.turns["refuse"] = Rotation(len(self.refusals))

    def step(self) -> float:
        """One update; the loss before it (nats).

        Raises:
            GuardError: when the loss is not finite.
        """
        recipe, take = self.recipe, self.turns
        rate = recipe.learning_rate * min(1.0, (self.steps + 1) / max(recipe.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        refuse = [self.refusals[i] for i in take["refuse"].next(recipe.refuse_rows)]
        answer = [self.answers[i] for i in take["answer"].next(recipe.answer_rows)]
        held = take["hold"].next(recipe.hold_rows) if recipe.hold_weight else []
        logits = reply_logits(self.loaded, [*refuse, *answer, *(self.hold.rows[i] for i in held)])
        loss = mean_cross_entropy(refuse, logits)
        if answer:
            loss = loss + recipe.answer_weight * mean_cross_entropy(answer, logits[len(refuse) :])
        if held:
            rows = zip(held, logits[len(refuse) + len(answer) :], strict=True)
            loss = (
                loss
                + recipe.hold_weight * torch.stack([row_divergence(self.hold.logits[i], r) for i, r in rows]).mean()
            )
        backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return float(loss.detach())


def mean_cross_entropy(rows: Sequence[TokenisedAnchor], logits: Sequence[Tensor]) -> Tensor:
    """Mean over rows of the mean cross-entropy of their replies (nats); further ``logits`` are not looked at."""
    parts = [
        F.cross_entropy(found, torch.tensor(row.reply, device=found.device))
        for row, found in zip(rows, logits, strict=False)
    ]
    return torch.stack(parts).mean()


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
        raise GuardError("the model has no trainable parameter", seen=loaded.name)
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
