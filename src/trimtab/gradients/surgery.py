"""Gradient surgery: pure functions from (task gradient, safety gradient) to an edited task gradient.

Covered: the global conflict test, SPF Algorithm 1, removal of one direction, Polyak's step for one or more losses.
Not covered: where gradients come from, optimizers, frameworks. Nothing here changes its arguments unless asked to.

Source of the algorithm: "Understanding and Preserving Safety in Fine-Tuned LLMs" (arXiv 2601.10141), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.factors import SafetyGradient
from trimtab.gradients.subspace import Basis, basis_of_factors, basis_of_matrix
from trimtab.gradients.sums import squared_norm

Gradients = Mapping[str, Tensor]


class Surgery(NamedTuple):
    """An edited gradient and what was done.

    Attributes:
        gradients: edited blocks only; a block that is absent keeps its task gradient.
        conflict: ``<g_u, g_s>`` over all shared blocks; negative means that the task step raises the anchor loss.
        cosine: the same, divided by both norms.
        removed: share of the task gradient's norm that was removed, 0 to 1.
        projected: number of blocks edited.
    """

    gradients: dict[str, Tensor]
    conflict: float
    cosine: float
    removed: float
    projected: int


def conflict(task: Gradients, safety: SafetyGradient) -> float:
    """``<g_u, g_s>`` over the blocks that both have, in float64.

    Raises:
        GuardError: when no block is shared (the guard would silently do nothing) or a gradient is not finite.
    """
    total, shared = 0.0, 0
    for name, gradient in task.items():
        inner = safety.inner(name, gradient)
        if inner is not None:
            total, shared = total + float(inner), shared + 1
    if shared == 0:
        raise GuardError("task and anchors share no parameter, so the guard cannot act", fix="check what is trainable")
    if not torch.isfinite(torch.tensor(total)):
        raise GuardError("a gradient is not finite", seen=f"<task, safety> = {total}", fix="lower the learning rate")
    return total


class Remainder(NamedTuple):
    """``kept``: what is left of a block, in float32, of its shape. ``removed``: squared norm of what was taken off."""

    kept: Tensor
    removed: float


def spf_algorithm1(task: Gradients, safety: SafetyGradient, rank: int = 20, *, in_place: bool = False) -> Surgery:
    """SPF Algorithm 1: where the whole gradients conflict, take every block off its top-``rank`` left safety subspace.

    ``if <g_u, g_s> < 0: G_u <- G_u - U (U^T G_u)`` for every block, with ``U`` (rows x k) the left singular vectors of
    the block's safety gradient; otherwise nothing changes. A block that the anchors do not reach keeps its gradient.

    Where k reaches the number of rows, ``U U^T`` is the identity and the whole block would vanish (LoRA's ``A`` factor,
    r x in, with r <= k). The paper does not say what happens there; such a block loses only the one direction of the
    anchors' own gradient. This is a variant of ours, needed for LoRA.

    Args:
        task: by name, each of the parameter's shape.
        safety: the anchors' gradient at the same parameters.
        rank: k, the paper's 20.
        in_place: edit the task's own tensors, without room for a second copy of them.

    Returns:
        The edited blocks, each of its parameter's shape and dtype (none where the gradients do not conflict), with the
        measurements of ``Surgery``.

    Raises:
        GuardError: as ``conflict``; where the gradients conflict, a rank below 1.

    Source: arXiv 2601.10141, Algorithm 1.
    """
    with full_precision_matmul():  # its sign decides
        value = conflict(task, safety)
    norm = math.sqrt(squared_norm(task))
    cosine = value / max(norm * safety.squared_norm() ** 0.5, 1e-30)
    if value >= 0:
        return Surgery(gradients={}, conflict=value, cosine=cosine, removed=0.0, projected=0)
    edited: dict[str, Tensor] = {}
    removed = 0.0
    with full_precision_matmul():
        for name, gradient in task.items():
            basis = safety_basis(safety, name, rank)
            if basis is None or basis.U.shape[1] == 0:
                continue
            rows = gradient.shape[0] if gradient.ndim else 1
            if basis.U.shape[1] >= rows and gradient.numel() > 1:
                left = remove_direction(gradient, _dense_block(safety, name))
            else:
                left = project_out(gradient, basis.U, in_place=in_place)
            edited[name] = _stored(left.kept, gradient) if in_place else left.kept.to(gradient.dtype)
            removed += left.removed
    share = math.sqrt(removed) / max(norm, 1e-30)
    return Surgery(gradients=edited, conflict=value, cosine=cosine, removed=share, projected=len(edited))


def safety_basis(safety: SafetyGradient, name: str, rank: int) -> Basis | None:
    """Left basis of one block of the safety gradient, or None where the anchors do not reach it."""
    if name in safety.factored:
        return basis_of_factors(safety.factored[name], rank)
    return basis_of_matrix(safety.dense[name], rank) if name in safety.dense else None


def project_out(gradient: Tensor, U: Tensor, *, in_place: bool = False) -> Remainder:
    """``G - U (U^T G)`` in float32, and ``||U^T G||^2``.

    Args:
        gradient: (rows, ...). U: rows x k with orthonormal columns.
        in_place: a float32 gradient that lies row by row is itself changed.
    """
    flat = gradient.float().reshape(U.shape[0], -1)  # of such a gradient a view
    along = U.T @ flat  # k x columns
    mine = in_place and flat.data_ptr() == gradient.data_ptr()
    kept = flat.addmm_(U, along, alpha=-1) if mine else torch.addmm(flat, U, along, alpha=-1)
    return Remainder(kept.reshape(gradient.shape), float(along.square().sum(dtype=torch.float64)))


def remove_direction(gradient: Tensor, direction: Tensor) -> Remainder:
    """``g - (<g, d> / <d, d>) d`` in float32: what is left has no component along ``direction`` (same shape)."""
    squared = direction.double().square().sum()
    if float(squared) == 0.0:
        return Remainder(gradient.float(), 0.0)
    inner = (gradient.double() * direction.double()).sum()
    kept = gradient.float() - (inner / squared).float() * direction.float()
    return Remainder(kept, float(inner.square() / squared))


def joint_step(losses: Tensor, gram: Tensor) -> Tensor:
    """Multipliers ``m >= 0`` of the shortest move ``-sum_i m_i g_i`` that brings every linearised loss to zero.

    With ``gram[i, j] = <g_i, g_j>`` the move changes loss i by ``-(gram m)_i``, so ``gram m = losses``. For one loss
    this is Polyak's step for a known optimal value (B. T. Polyak, 1969), ``m = loss / ||g||^2``. One whose multiplier
    would be negative is already served by moving for the others and is left out. Nearly opposite gradients give long
    moves: the caller bounds the length.

    Args:
        losses: (k,) not negative, k small; one of zero may fall and does not rise.
        gram: (k, k) symmetric, float64.
    """
    active = [i for i in range(len(losses)) if float(losses[i]) >= 0 and float(gram[i, i]) > 0]
    multipliers = torch.zeros(len(losses), dtype=torch.float64)
    while active:
        part = gram[active][:, active].double()
        ridge = 1e-3 * part.diagonal().mean() * torch.eye(len(active), dtype=torch.float64)
        solved = torch.linalg.solve(part + ridge, losses[active].double())
        if bool((solved >= 0).all()):
            multipliers[active] = solved
            break
        active.pop(int(solved.argmin()))
    return multipliers


def full_precision_matmul() -> AbstractContextManager[None]:
    """No TF32 inside: with it, ``U^T G'`` is 1,000 times further from zero. The caller's setting is restored."""
    return _matmul_precision("ieee")


def coarse_matmul() -> AbstractContextManager[None]:
    """TF32 inside, where the device has it: for inner products and moves, whose errors average out."""
    return _matmul_precision("tf32")


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    """Through PyTorch's switch for each backend: the older one for all of them raises where a caller (Transformers with
    ``tf32: true``) has used these."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = wanted
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = "none" if value == inherited else value  # "none": as the setting above it


def _dense_block(safety: SafetyGradient, name: str) -> Tensor:
    return safety.factored[name].dense() if name in safety.factored else safety.dense[name]


def _stored(kept: Tensor, gradient: Tensor) -> Tensor:
    return gradient if kept.data_ptr() == gradient.data_ptr() else gradient.copy_(kept)
