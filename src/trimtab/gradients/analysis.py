"""What gradients look like: spectra, angles, overlaps, and a first-order bound on drift.

Covered: the quantities that the analysis of arXiv 2601.10141 is about (energy ratio, cosine of safety and task
gradient, overlap of one sample's subspace with a batch's), for factored and dense blocks, by layer; the drift bound.
Not covered: taking the gradients of a model (``factors.py``), running and drawing (``trimtab.geometry``).

The paper's theorem was not at hand. The bound here is our reconstruction: first order, plain SGD only (see ``bound``).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.gradients.factors import Factors, SafetyGradient
from trimtab.gradients.subspace import Basis, Side, basis_of_factors, basis_of_matrix, energy_ratio, overlap
from trimtab.gradients.surgery import Gradients

_DEPTH = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")


class Place(NamedTuple):
    """Where a weight sits: ``depth`` of its layer (-1 outside the layers) and its ``kind`` (``q_proj``, ...)."""

    depth: int
    kind: str


def place_of(name: str) -> Place:
    """Read depth and kind from a parameter's name; ``lora_A``/``lora_B`` stay part of the kind."""
    found = _DEPTH.search("." + name)
    words = [word for word in name.removesuffix(".weight").split(".") if word != "default"]
    kind = "/".join(words[-2:]) if words[-1].startswith("lora_") else words[-1]
    return Place(depth=int(found[1]) if found else -1, kind=kind)


def matrix_blocks(gradient: SafetyGradient) -> list[str]:
    """Names of the blocks that are matrices inside layers: what a subspace is asked of."""
    matrices = [*gradient.factored, *(name for name, block in gradient.dense.items() if block.ndim == 2)]
    return sorted(name for name in matrices if place_of(name).depth >= 0)


def block_basis(gradient: SafetyGradient, name: str, rank: int, side: Side = "left") -> Basis:
    """Top singular vectors and all singular values of one block."""
    if name in gradient.factored:
        return basis_of_factors(gradient.factored[name], rank, side)
    return basis_of_matrix(gradient.dense[name], rank, side)


def spectra(gradient: SafetyGradient) -> dict[str, Tensor]:
    """Singular values (descending) of every matrix block inside the layers."""
    return {name: block_basis(gradient, name, 1).singular_values for name in matrix_blocks(gradient)}


def energy_curve(values: Tensor, ranks: list[int]) -> list[float]:
    """CER(k) for each k of ``ranks``."""
    return [energy_ratio(values, k) for k in ranks]


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of the energy shares (O. Roy, M. Vetterli 2007): how many directions really carry it."""
    energy = values.double().square()
    share = energy / energy.sum().clamp_min(1e-300)
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def inner(first: SafetyGradient, second: SafetyGradient, name: str) -> float | None:
    """``<G_1, G_2>`` of one block in float64; two factored blocks meet in a token-by-token product."""
    a, b = first.factored.get(name), second.factored.get(name)
    if a is not None and b is not None:
        return _inner_of_factors(a, b)
    if a is None and b is not None:
        return inner(second, first, name)
    dense = second.dense.get(name)
    value = first.inner(name, dense) if dense is not None else None
    return float(value) if value is not None else None


def cosine(first: SafetyGradient, second: SafetyGradient, names: list[str] | None = None) -> float:
    """Cosine over the blocks that both have (or over ``names``); 0 where one of the two is zero."""
    chosen = names if names is not None else [*first.factored, *first.dense]
    products = [(value, name) for name in chosen if (value := inner(first, second, name)) is not None]
    norms = [math.sqrt(sum(max(inner(one, one, name) or 0.0, 0.0) for _, name in products)) for one in (first, second)]
    return sum(value for value, _ in products) / max(norms[0] * norms[1], 1e-300) if all(norms) else 0.0


class Overlap(NamedTuple):
    """``value``: ``||U^T V||_F^2 / min(k, k')``. ``chance``: its expectation for random subspaces of the same sizes."""

    value: float
    chance: float


def subspace_overlap(U: Tensor, V: Tensor) -> Overlap:
    """How far one basis (n x k) lies inside another (n x k'), beside what chance gives."""
    smaller, larger = sorted((U.shape[1], V.shape[1]))
    return Overlap(value=overlap(U, V), chance=larger / U.shape[0] if smaller else 0.0)


def block_overlap(first: SafetyGradient, second: SafetyGradient, name: str, rank: int, side: Side = "left") -> Overlap:
    """The same for the top subspaces of one block of two gradients."""
    return subspace_overlap(block_basis(first, name, rank, side).U, block_basis(second, name, rank, side).U)


class DriftBound(NamedTuple):
    """First-order change of the anchor loss by one SGD step along ``-lr * task``, and bounds on it (nats).

    Attributes:
        first_order: ``-lr <g_s, g>`` with the gradient ``g`` that is applied.
        by_block: ``lr sum_b sqrt(1 - CER_b(k)) ||G_s,b|| ||G_b||``; holds after Algorithm 1's projection.
        overall: ``lr sqrt(1 - CER(k)) ||g_s|| ||g||`` with the energy ratio of all blocks together; looser.
        cer: that energy ratio.
    """

    first_order: float
    by_block: float
    overall: float
    cer: float


def bound(applied: Gradients, safety: SafetyGradient, rank: int, lr: float) -> DriftBound:
    """Evaluate the drift bound for the gradient that SGD applies.

    After ``G_b <- (I - U_k U_k^T) G_b`` only the tail ``E_b`` of ``G_s,b`` beyond rank k is left in the inner product:
    ``<G_s,b, G_b> = <E_b, G_b>`` and ``||E_b||^2 = (1 - CER_b(k)) ||G_s,b||^2``; Cauchy-Schwarz does the rest. Blocks
    that the projection does not touch (no anchor gradient) add nothing. What is missing is the second-order term
    ``(l lr^2 / 2) ||g||^2`` with the smoothness ``l`` of the anchor loss, which nobody knows. Derived by us; momentum,
    AdamW and weight decay void it.
    """
    exact, blocks, tail, energy, size = 0.0, 0.0, 0.0, 0.0, 0.0
    for name, gradient in applied.items():
        value = safety.inner(name, gradient)
        if value is None:
            continue
        singular = block_basis(safety, name, rank).singular_values.double().square()
        left = float(singular[rank:].sum())
        norm = float(gradient.double().square().sum())
        exact += float(value)
        blocks += math.sqrt(left * norm)
        tail, energy, size = tail + left, energy + float(singular.sum()), size + norm
    cer = 1.0 - tail / max(energy, 1e-300)
    return DriftBound(-lr * exact, lr * blocks, lr * math.sqrt(tail * size), cer)


def _inner_of_factors(a: Factors, b: Factors) -> float:
    return float(((a.D @ b.D.T) * (a.X @ b.X.T)).sum(dtype=torch.float64))
