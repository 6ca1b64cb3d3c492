"""Sums over whole gradients: inner products and norms, without a wide copy of anything.

Products of at most 2^18 elements are taken in float32 and summed in float64: as good as float64 throughout for what is
decided with them (relative error below 1e-6 of the norms' product). A float64 copy of every block costs three times as
long and twice the block's memory. A share that a rule removed must not be read off the difference of two such norms,
where it drowns: each rule has it from what it takes off.

Covered: dense blocks, sharded ones (the sum is reduced, the same on every rank). Not covered: factored blocks
(``factors.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.gradients.sharding import is_sharded, scalar

AT_ONCE = 1 << 18  # elements


def dot(one: Tensor, other: Tensor) -> float:
    """``<one, other>`` of two tensors of one shape."""
    if is_sharded(one) or is_sharded(other):
        return scalar((one.double() * other.double()).sum())
    pairs = zip(one.reshape(-1).split(AT_ONCE), other.reshape(-1).split(AT_ONCE), strict=True)
    return float(torch.stack([torch.dot(a.float(), b.float()) for a, b in pairs]).double().sum())


def squared_norm(gradients: Mapping[str, Tensor]) -> float:
    """``||g||^2`` over all blocks."""
    return sum(dot(gradient, gradient) for gradient in gradients.values())
