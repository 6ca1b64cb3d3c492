"""Which sample: the built-in general refusal, the bi-level choice from a pool, or every candidate tried.

Bi-level (arXiv 2601.01887 states the problem; its solver's settings are not readable, so this is our reconstruction):

    lower:  theta(w) = argmin  (1/N) sum_i w_i l_i(theta)            from the broken theta*, l_i mean CE of reply i
    upper:  min_w  KL_harm(theta) + KL_task(theta) + lambda ||w||^2   0 <= w <= 1, sum w = m

with forward divergences from the ancestor on harmful prompts and from theta* on task prompts, on the left-hand model's
own greedy continuations. Solved with a first-order value-function penalty and two copies of the adapter:

    theta' <- theta' - a grad g(theta', w)
    theta  <- theta  - a grad( F(theta)/gamma + g(theta, w) )
    w      <- Proj( w - b (2 lambda w + (gamma/N)(l(theta) - l(theta'))) )

Covered: the three ways, their cost in sample passes and seconds. Not covered: what is done with the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.anchors import Anchor
from trimtab.errors import GuardError, UsageError
from trimtab.patching.adapters import Workbench
from trimtab.patching.heldout import Continuations, reply_logits, row_divergence
from trimtab.patching.recover import backward
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor, reader_for, tokenise


@dataclass(frozen=True)
class BilevelSettings:
    """The solver. Ours throughout: the source gives none of these numbers.

    Attributes:
        count: m, samples to choose.
        outer, inner: rounds, and steps of theta' in each.
        step: a; gradients are clipped to norm 1 before it is applied.
        weight_step: b. gamma: penalty weight. ridge: lambda.
    """

    count: int = 1
    outer: int = 8
    inner: int = 2
    step: float = 0.1
    weight_step: float = 10.0
    gamma: float = 4.0
    ridge: float = 0.05

    def __post_init__(self) -> None:
        if min(self.count, self.outer, self.inner) < 1 or min(self.step, self.weight_step, self.gamma) <= 0:
            raise UsageError("the selection needs positive counts and steps", seen=self, fix="raise what is not")


class Selection(NamedTuple):
    """``order``: candidates, best first. ``scores``: weights (bi-level, more is better) or upper objectives
    (exhaustive, less is better). ``passes``: candidate rows read with gradient. ``seconds``: wall time."""

    order: list[int]
    scores: list[float]
    passes: int
    seconds: float


class Targets(NamedTuple):
    """The two divergences of the upper level: the ancestor on harmful prompts, the given model on task prompts."""

    harm: Continuations
    task: Continuations


def bilevel(
    bench: Workbench,
    candidates: Sequence[Anchor],
    targets: Targets,
    settings: BilevelSettings = BilevelSettings(),
    system: str | None = None,
) -> Selection:
    """First-order penalty method; the repair is left as it was.

    Args:
        bench: the given model with the repair attached.
        candidates: samples to choose from, each with its reply.
        targets: what the upper level compares with.
        settings: the solver's.
        system: system message of the candidates; None leaves it to the chat template.

    Returns:
        The candidates by weight, the heaviest first.

    Raises:
        GuardError: no candidates, fewer than ``count``, or a loss that is not finite.

    Source: arXiv 2601.01887 states the problem; the solver is ours (see the module's docstring).
    """
    rows, reader = _prepare(bench, candidates, settings.count, system)
    started, n, gamma = time.monotonic(), len(rows), settings.gamma
    first = bench.read()
    inner_copy, outer_copy = first, first
    w = torch.full((n,), settings.count / n, dtype=torch.float64)
    passes = 0
    try:
        for _ in range(settings.outer):
            bench.write(inner_copy)
            for _ in range(settings.inner):
                _descend(bench, lambda w=w: weighted(reader, rows, w), settings.step)  # type: ignore[misc]
            inner_losses = reader.measure(rows).double()
            inner_copy = bench.read()
            bench.write(outer_copy)
            _descend(bench, lambda w=w: upper(bench, targets) / gamma + weighted(reader, rows, w), settings.step)  # type: ignore[misc]
            outer_losses = reader.measure(rows).double()
            outer_copy = bench.read()
            slope = 2 * settings.ridge * w + gamma / n * (outer_losses - inner_losses)
            w = project_to_capped_simplex(w - settings.weight_step * slope, settings.count)
            passes += (settings.inner + 1) * n
    finally:
        bench.write(first)
    order = sorted(range(n), key=lambda i: (-float(w[i]), i))
    return Selection(order, w.tolist(), passes, time.monotonic() - started)


def exhaustive(
    bench: Workbench,
    candidates: Sequence[Anchor],
    targets: Targets,
    *,
    steps: int = 6,
    step: float = 0.1,
    system: str | None = None,
) -> Selection:
    """Patch with every candidate alone and rank by the upper objective; the oracle for ``bilevel``."""
    rows, reader = _prepare(bench, candidates, 1, system)
    started, first, scores = time.monotonic(), bench.read(), []
    try:
        for row in rows:
            bench.write(first)
            for _ in range(steps):
                _descend(bench, lambda row=row: reader.losses([row]).mean(), step)  # type: ignore[misc]
            with torch.no_grad():
                scores.append(float(upper(bench, targets)))
    finally:
        bench.write(first)
    order = sorted(range(len(rows)), key=lambda i: (scores[i], i))
    return Selection(order, scores, steps * len(rows), time.monotonic() - started)


def upper(bench: Workbench, targets: Targets) -> Tensor:
    """``KL_harm + KL_task`` at the current parameters (nats a token); differentiable."""
    total = torch.zeros((), device=bench.loaded.device)
    for part in targets:
        logits = reply_logits(bench.loaded, part.rows)
        found = [row_divergence(target, row) for target, row in zip(part.logits, logits, strict=True)]
        total = total + torch.stack(found).mean()
    return total


def weighted(reader: AnchorReader, rows: Sequence[TokenisedAnchor], w: Tensor) -> Tensor:
    """``(1/N) sum_i w_i l_i``; rows without weight are not read."""
    live = [i for i in range(len(rows)) if float(w[i]) > 0]
    losses = reader.losses([rows[i] for i in live])
    return (losses * w[live].to(losses)).sum() / len(rows)


def project_to_capped_simplex(v: Tensor, total: float) -> Tensor:
    """Euclidean projection on ``{0 <= w <= 1, sum w = total}``: ``clip(v - nu, 0, 1)``, nu by bisection.

    Raises:
        UsageError: when ``total`` is not within 0 and the number of entries.
    """
    if not 0 <= total <= len(v):
        raise UsageError(
            "that many samples cannot be chosen", seen=f"{total} of {len(v)}", fix="choose between 0 and that many"
        )
    low, high = float(v.min()) - 1.0, float(v.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((v - middle).clamp(0, 1).sum()) > total else (low, middle)
    return (v - (low + high) / 2).clamp(0, 1)


def _prepare(
    bench: Workbench, candidates: Sequence[Anchor], count: int, system: str | None
) -> tuple[list[TokenisedAnchor], AnchorReader]:
    if len(candidates) < count:
        raise GuardError(
            "fewer candidates than samples to choose",
            seen=f"{len(candidates)} < {count}",
            fix="choose fewer, or give more candidates",
        )
    rows = [tokenise(bench.loaded, anchor, system, None) for anchor in candidates]
    return rows, reader_for(bench.loaded, bench.model)


def _descend(bench: Workbench, loss_of: Callable[[], Tensor], step: float) -> None:
    """One plain gradient step, the gradient clipped to norm 1."""
    parameters = list(bench.parameters.values())
    backward(loss_of())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=step)
                parameter.grad = None
