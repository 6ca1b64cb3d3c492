"""Repairs of weights after training: Safe LoRA and RESTA, as functions on matrices.

Covered: Safe LoRA (arXiv 2405.16833) on LoRA factors and on a full difference, RESTA (arXiv 2402.11746) with DARE.
Not covered: Safe Delta (arXiv 2505.12038): what a column sub-block shares of its budget cannot be told from the formula
that was at hand, and its code has no licence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.tuning.rivals.asft import apply_c


class Projected(NamedTuple):
    """``cosines`` of every module between the update and its projection; ``chosen`` modules, projected."""

    cosines: dict[str, float]
    chosen: dict[str, Tensor]


def safe_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    deltas: Mapping[str, Tensor],
    *,
    number: int | None = 10,
    tau: float | None = None,
) -> Projected:
    """Safe LoRA: where ``cos(C B A, B A)`` is low, ``B <- C B`` with ``C = V V^T / ||V||_F``.

    C is not a projector (it is not idempotent); that is the source's formula. Cosines are rounded to five decimals, as
    there. No out x in product is formed: ``<M A, N A> = sum(M^T N * A A^T)``.

    Args:
        factors: by module, B (out x r) and A (r x in).
        deltas: by module, ``V = W_aligned - W_base`` (out x in).
        number: how many modules of the lowest cosine are projected (the source's default, 10), or None.
        tau: instead, all modules with a cosine of at most tau (the source's 0.5).

    Raises:
        UsageError: unless exactly one of ``number`` and ``tau`` is given.
    """
    if (number is None) == (tau is None):
        raise UsageError("choose modules by number or by threshold, not both", seen=f"number {number}, tau {tau}")
    projected = {name: apply_c(deltas[name].to(B), B) for name, (B, _) in factors.items()}
    cosines = {name: round(_cosine(projected[name], B, A @ A.T), 5) for name, (B, A) in factors.items()}
    ranked = sorted(cosines, key=lambda name: (cosines[name], name))
    chosen = ranked[:number] if number is not None else [name for name in ranked if cosines[name] <= float(tau or 0.0)]
    return Projected(cosines, {name: projected[name] for name in chosen})


def resta(
    tuned: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    gamma: float = 0.5,
    drop: float = 0.3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """RESTA: ``theta_tuned + gamma * DARE_p(theta_aligned - theta_base)``.

    DARE (arXiv 2311.03099) drops each entry with probability p and divides the rest by 1 - p. The mask depends on the
    seed and the parameter's name only, not on the order of parameters.
    """
    result = {}
    for name, weight in tuned.items():
        if name not in aligned or name not in base or base[name].shape != weight.shape:
            result[name] = weight
            continue
        vector = aligned[name].float().cpu() - base[name].float().cpu()
        result[name] = (weight.float() + gamma * dare(vector, drop, seed, name).to(weight.device)).to(weight.dtype)
    return result


def dare(vector: Tensor, drop: float, seed: int, name: str) -> Tensor:
    """Drop entries at random and rescale the rest, without touching the global random state."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    keep = torch.rand(vector.shape, generator=draw) >= drop
    return vector * keep / (1.0 - drop)


def _cosine(M: Tensor, N: Tensor, outer: Tensor) -> float:
    """Cosine of ``M A`` and ``N A`` from ``A A^T``."""
    M, N, outer = M.double(), N.double(), outer.double()
    sizes = ((M.T @ M) * outer).sum() * ((N.T @ N) * outer).sum()
    return float(((M.T @ N) * outer).sum() / sizes.clamp_min(1e-300).sqrt())
