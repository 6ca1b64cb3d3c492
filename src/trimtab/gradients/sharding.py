"""Tensors that may be shards (DTensor): how to get one number or the whole from them, the same on every rank.

A sum over a sharded tensor is a partial sum on each rank; ``float()`` of it would be this rank's part, silently. Every
inner product of this package goes through ``scalar``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (without importing the distributed package where nobody uses it)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def scalar(value: Tensor) -> float:
    """A one-element tensor as a number; a partial sum over shards is reduced first."""
    return float(whole(value))
