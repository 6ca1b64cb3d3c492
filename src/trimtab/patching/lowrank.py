"""Repair in one step: a truncated gradient step, written down as an adapter without any training.

Published form (as reported of arXiv 2601.01887): ``W <- W - alpha eta U_k S_k V_k^T`` with ``G = U S V^T`` the gradient
of the one safety sample. The source leaves alpha and the start point open; here the start is the given model, and only
the product ``step = alpha eta`` exists.

Ours: the gradient of both sides, joined by Polyak multipliers (``surgery.joint_step``), and a line search over the
length on the rows that the gradient is taken from (``climb.py``).

The truncated step is ``B = -step U_k`` (out x k), ``A = (D U_k)^T X`` (k x in), because ``U_k U_k^T G`` is the
truncated singular value decomposition; ``G = D^T X`` itself is never built.

Covered: every linear layer that the adapter reaches, quantised bases too; the measured rank of the gradient.
Not covered: embeddings and norms, which a LoRA adapter does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.factors import Factors
from trimtab.gradients.subspace import basis_of_factors, energy_ratio
from trimtab.gradients.surgery import full_precision_matmul, joint_step
from trimtab.patching.adapters import LowRank, Workbench

PUBLISHED_RANK = 20


class WeightGradient(NamedTuple):
    """Gradient with respect to the effective weight of each adapted layer. ``loss`` in nats."""

    loss: float
    blocks: dict[str, Factors]

    def squared_norm(self) -> float:
        """``||G||^2`` over all layers."""
        return sum(float(block.squared_norm()) for block in self.blocks.values())


class RankReport(NamedTuple):
    """How low-rank the gradient is.

    Attributes:
        tokens: the bound that holds by construction: tokens that carry gradient.
        energy: share of squared norm in each layer's first ``k`` directions, over all layers, by ``k``.
        needed: smallest k whose share reaches 0.9 / 0.95 / 0.99 in the median layer.
    """

    tokens: int
    energy: dict[int, float]
    needed: dict[float, int]


def weight_gradient(bench: Workbench, loss_of: Callable[[], Tensor]) -> WeightGradient:
    """One forward and one backward through the activations; no weight gradient is formed.

    The layers are hooked outside the adapter, so that what is found is the gradient of base plus adapters.

    Raises:
        GuardError: when the loss is not finite.
    """
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [layer.register_forward_hook(_recorder(uses, name)) for name, layer in bench.layers.items()]
    try:
        with torch.enable_grad():
            loss = loss_of()
    finally:
        for handle in handles:
            handle.remove()
    value = float(loss.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise GuardError("the loss of the sample is not finite", seen=value, fix="check the given weights")
    flat = [(name, output, seen) for name, pairs in uses.items() for output, seen in pairs]
    found = torch.autograd.grad(loss, [output for _, output, _ in flat], allow_unused=True)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, _, seen), gradient in zip(flat, found, strict=True):
        if gradient is not None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float(), seen.reshape(-1, seen.shape[-1]).float()
            parts.setdefault(name, []).append(rows)
    return WeightGradient(value, {name: _stack(pairs) for name, pairs in parts.items()})


def truncated_step(gradient: WeightGradient, rank: int, step: float) -> dict[str, LowRank]:
    """``-step`` times the best rank-``rank`` approximation of each layer's gradient, as factors.

    Args:
        gradient: of each layer, out x in as factors; nats for each unit of weight.
        rank: k; fewer where a layer's gradient has a lower numerical rank.
        step: alpha eta of the source, the length as a learning rate: change of weight for each unit of gradient.

    Returns:
        By layer ``A`` (k x in) and ``B`` (out x k), float32; a layer whose gradient is zero is absent.

    Raises:
        GuardError: a rank below 1.

    Source: arXiv 2601.01887, as reported; see the module's docstring.
    """
    changes = {}
    with full_precision_matmul():
        for name, block in gradient.blocks.items():
            U = basis_of_factors(block, rank).U  # out x k
            if U.shape[1]:
                changes[name] = LowRank(A=(block.D @ U).T @ block.X, B=-step * U)
    return changes


def joined(gradients: Sequence[WeightGradient], excess: Sequence[float]) -> WeightGradient:
    """``sum_i m_i G_i`` with Polyak's multipliers for bringing every linearised loss down by ``excess[i]`` (nats)."""
    gram = torch.tensor([[inner(a, b) for b in gradients] for a in gradients], dtype=torch.float64)
    weights = joint_step(torch.tensor(list(excess), dtype=torch.float64), gram).tolist()
    blocks = {}
    for name in dict.fromkeys(name for one in gradients for name in one.blocks):
        parts = [(w, g.blocks[name]) for w, g in zip(weights, gradients, strict=True) if w > 0 and name in g.blocks]
        if parts:
            blocks[name] = Factors(
                D=torch.cat([weight * block.D for weight, block in parts]), X=torch.cat([block.X for _, block in parts])
            )
    return WeightGradient(sum(w * g.loss for w, g in zip(weights, gradients, strict=True)), blocks)


def inner(first: WeightGradient, second: WeightGradient) -> float:
    """``<G, H>`` over all layers from the factors, in float64."""
    total = 0.0
    for name, one in first.blocks.items():
        if name in second.blocks:
            other = second.blocks[name]
            total += float(((one.D @ other.D.T) * (one.X @ other.X.T)).sum(dtype=torch.float64))
    return total


def measured_rank(gradient: WeightGradient, ks: Sequence[int] = (1, 2, 5, 10, 20)) -> RankReport:
    """Cumulative energy ratio of the gradient's singular values, and the ranks that reach 0.9, 0.95 and 0.99."""
    spectra = [basis_of_factors(block, 1).singular_values.double() for block in gradient.blocks.values()]
    total = sum(float(values.square().sum()) for values in spectra)
    energy = {k: sum(float(values[:k].square().sum()) for values in spectra) / max(total, 1e-30) for k in ks}
    needed = {}
    for share in (0.9, 0.95, 0.99):
        ranks = sorted(_needed(values, share) for values in spectra)
        needed[share] = ranks[len(ranks) // 2] if ranks else 0
    tokens = max((block.D.shape[0] for block in gradient.blocks.values()), default=0)
    return RankReport(tokens, energy, needed)


def _needed(values: Tensor, share: float) -> int:
    return next((k for k in range(1, len(values) + 1) if energy_ratio(values, k) >= share), len(values))


def _recorder(uses: dict[str, list[tuple[Tensor, Tensor]]], name: str) -> Any:
    def hook(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        if output.requires_grad:
            uses.setdefault(name, []).append((output, inputs[0].detach()))

    return hook


def _stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    D, X = torch.cat([gradient for gradient, _ in pairs]), torch.cat([seen for _, seen in pairs])
    reached = D.abs().amax(1) > 0
    return Factors(D=D[reached], X=X[reached])
