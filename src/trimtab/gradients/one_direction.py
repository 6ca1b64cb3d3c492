"""Surgery with one direction, the anchors' own gradient: what the literature did before and beside SPF.

Covered: A-GEM (arXiv 1812.00420), PCGrad (arXiv 2001.06782), SafeGrad's combination (arXiv 2508.07172), the per-tensor
projection of the SPF authors' released trainer. Not covered: SPF Algorithm 1 (``surgery.py``), taking the gradients.

Every function is pure: two gradients by name in, edited blocks out; sums as in ``sums.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.sums import dot, squared_norm
from trimtab.gradients.surgery import Gradients

#: Below this squared norm of a tensor's anchor gradient the released SPF trainer leaves the task gradient alone.
RELEASED_THRESHOLD = 1e-8


class Edited(NamedTuple):
    """Blocks to write back, and what was done.

    Attributes:
        gradients: edited blocks only; a block that is absent keeps its task gradient.
        conflict: ``<g_task, g_anchor>`` over the shared blocks, before the edit.
        projected: blocks that lost a component.
        disabled: blocks that a conflict would have changed, but whose anchor gradient is below the threshold.
        removed: share of the task gradient's norm that was removed.
    """

    gradients: dict[str, Tensor]
    conflict: float
    projected: int
    disabled: int
    removed: float


def inner(first: Gradients, second: Gradients) -> float:
    """Inner product over the blocks that both have, in float64.

    Raises:
        GuardError: when it is not finite.
    """
    total = sum(dot(first[name], second[name]) for name in first if name in second)
    if not math.isfinite(total):
        raise GuardError("a gradient is not finite", seen=f"inner product {total}", fix="lower the learning rate")
    return total


def per_tensor(task: Gradients, anchor: Gradients, threshold: float = RELEASED_THRESHOLD) -> Edited:
    """The released trainer's rule: for each tensor, if ``<g_u, g_s> < 0`` then ``g_u -= (<g_u, g_s>/<g_s, g_s>) g_s``.

    One departure from the release: a tensor without an anchor gradient keeps its task gradient (there it loses it).
    """
    _require_shared(task, anchor)
    edited: dict[str, Tensor] = {}
    total, lost, disabled = 0.0, 0.0, 0
    for name in (name for name in task if name in anchor):  # in one order on every process
        value, size = inner({name: task[name]}, {name: anchor[name]}), dot(anchor[name], anchor[name])
        total += value
        if value < 0 and size > threshold:
            edited[name] = _minus(task[name], value / size, anchor[name])
            lost += value**2 / size
        elif value < 0:
            disabled += 1
    return Edited(edited, total, len(edited), disabled, _share(lost, squared_norm(task)))


def agem(task: Gradients, anchor: Gradients) -> Edited:
    """A-GEM, equations 10-11: ``if <g, g_ref> < 0: g -= (<g, g_ref> / <g_ref, g_ref>) g_ref``, over all blocks."""
    _require_shared(task, anchor)
    value, size = inner(task, anchor), squared_norm(anchor)
    if value >= 0 or size == 0:
        return Edited({}, value, 0, 0, 0.0)
    shared = [name for name in task if name in anchor]
    edited = {name: _minus(task[name], value / size, anchor[name]) for name in shared}
    lost = (value / size) ** 2 * squared_norm({name: anchor[name] for name in shared})
    return Edited(edited, value, len(edited), 0, _share(lost, squared_norm(task)))


def pcgrad(task: Gradients, anchor: Gradients) -> Edited:
    """PCGrad for two tasks: each gradient loses its component against the *other's original*, then they are added.

    With two tasks the random order of the paper's Algorithm 1 changes nothing.
    """
    _require_shared(task, anchor)
    value = inner(task, anchor)
    if value >= 0:
        return Edited(_sum(task, anchor), value, 0, 0, 0.0)
    size, length = squared_norm(anchor), squared_norm(task)
    mine = {name: _minus(g, value / size, anchor[name]) for name, g in task.items() if name in anchor}
    theirs = {name: _minus(g, value / length, task[name]) for name, g in anchor.items() if name in task}
    lost = (value / size) ** 2 * squared_norm({name: anchor[name] for name in mine})
    return Edited(_sum({**task, **mine}, {**anchor, **theirs}), value, len(mine), 0, _share(lost, length))


def safegrad(task: Gradients, anchor: Gradients, rho: float = 1.0) -> Edited:
    """SafeGrad: A-GEM's projection of the task gradient, then ``+ rho g_anchor``, conflict or not.

    Source: arXiv 2508.07172; ``g_anchor`` is there the gradient of KL(aligned model || model) on alignment data.
    """
    projected = agem(task, anchor)
    kept = {**task, **projected.gradients}
    added = _sum(kept, {name: rho * gradient for name, gradient in anchor.items()})
    return projected._replace(gradients=added)


def _sum(first: Gradients, second: Gradients) -> dict[str, Tensor]:
    names = [*first, *(name for name in second if name not in first)]
    return {
        name: first[name] + second[name].to(first[name].dtype)
        if name in first and name in second
        else (first[name] if name in first else second[name]).clone()
        for name in names
    }


def _minus(gradient: Tensor, factor: float, direction: Tensor) -> Tensor:
    return torch.sub(gradient.float(), direction.float(), alpha=factor).to(gradient.dtype)


def _share(lost: float, squared: float) -> float:
    return math.sqrt(lost) / max(math.sqrt(squared), 1e-30)


def _require_shared(task: Gradients, anchor: Gradients) -> None:
    if not task.keys() & anchor.keys():
        raise GuardError("task and anchors share no parameter, so the guard cannot act", fix="check what is trainable")
