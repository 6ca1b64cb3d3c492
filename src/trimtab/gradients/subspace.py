"""The exact singular subspace of a factored gradient, and how two subspaces lie to each other.

Covered: top-k left or right basis from ``D`` and ``X`` (no matrix of the weight's size is decomposed), energy ratio,
principal angles, overlap. Not covered: using a basis on a gradient (``surgery.py``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.factors import Factors

Side = Literal["left", "right"]


class Basis(NamedTuple):
    """``U``: n x k with orthonormal columns; ``singular_values``: all of them, descending."""

    U: Tensor
    singular_values: Tensor


def basis_of_factors(factors: Factors, rank: int, side: Side = "left") -> Basis:
    """Top singular vectors of ``G = D^T X``, exactly, from thin QRs of the factors and an SVD of the small core.

    ``D^T = Qd Rd`` and ``X^T = Qx Rx`` give ``G = Qd (Rd Rx^T) Qx^T``; the core is at most tokens x tokens.

    Args:
        factors: D (tokens x rows) and X (tokens x columns).
        rank: k; fewer columns come back where G has a lower numerical rank.
        side: "left" spans the row (output) space, "right" the column (input) space.

    Returns:
        ``U``: rows x k for "left", columns x k for "right". ``singular_values``: min(tokens, rows, columns) of them.

    Raises:
        GuardError: a rank below 1.
    """
    _check_rank(rank)
    Qd, Rd = torch.linalg.qr(factors.D.T)  # rows x t, t x tokens
    Qx, Rx = torch.linalg.qr(factors.X.T)  # columns x t', t' x tokens
    left, values, right = torch.linalg.svd(Rd @ Rx.T, full_matrices=False)
    keep = _numerical_rank(values, rank, factors.shape)
    U = Qd @ left[:, :keep] if side == "left" else Qx @ right[:keep].T
    return Basis(U=U, singular_values=values)


def basis_of_matrix(matrix: Tensor, rank: int, side: Side = "left") -> Basis:
    """The same for a dense block; a 1-D tensor of length n is an n x 1 matrix."""
    _check_rank(rank)
    flat = matrix.float().reshape(matrix.shape[0], -1) if matrix.ndim else matrix.float().reshape(1, 1)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    keep = _numerical_rank(values, rank, (flat.shape[0], flat.shape[1]))
    return Basis(U=left[:, :keep] if side == "left" else right[:keep].T, singular_values=values)


def energy_ratio(singular_values: Tensor, k: int) -> float:
    """Cumulative energy ratio ``CER(k) = sum_{i<=k} s_i^2 / sum_i s_i^2`` (arXiv 2601.10141, via its reviews)."""
    energy = singular_values.double().square()
    total = float(energy.sum())
    return float(energy[:k].sum()) / total if total > 0 else 0.0


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between two orthonormal bases (n x k, n x k'), descending."""
    cosines: Tensor = torch.linalg.svdvals(first.T @ second)
    return cosines.clamp(0, 1)


def overlap(first: Tensor, second: Tensor) -> float:
    """``||U^T V||_F^2 / min(k, k')``: 1 for equal or nested subspaces, 0 for orthogonal ones."""
    smaller = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / smaller if smaller else 0.0


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise GuardError("the rank of a safety subspace is at least 1", seen=rank, fix="raise it; the paper takes 20")


def _numerical_rank(values: Tensor, rank: int, shape: tuple[int, int]) -> int:
    """How many of the first ``rank`` directions are real; the rest would be rounding noise, not safety."""
    if values.numel() == 0 or float(values[0]) == 0.0:
        return 0
    tolerance = float(values[0]) * max(shape) * torch.finfo(torch.float32).eps
    return min(rank, int((values > tolerance).sum()))
