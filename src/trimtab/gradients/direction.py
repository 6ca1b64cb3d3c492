"""A gradient over all trained blocks as a direction to move along: each block dense, or as factors where smaller.

Covered: inner products; how far to go along several directions at once, which follows from these alone; going there, in
place. Not covered: where gradients come from (``factors.py``, ``tuning/anchor_gradients.py``), the algebra of a joint
step (``surgery.joint_step``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.gradients.factors import Factors
from trimtab.gradients.sums import dot
from trimtab.gradients.surgery import coarse_matmul, joint_step

BUILT_AT_ONCE = 1 << 22  # elements of a factored block that are built at a time


@dataclass(frozen=True)
class Direction:
    """Attributes:
    dense: by parameter name, of the parameter's shape; may be sharded (DTensor).
    factored: by parameter name, ``D^T X`` (``factors.Factors``); never of a sharded parameter.
    """

    dense: Mapping[str, Tensor]
    factored: Mapping[str, Factors] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.dense or name in self.factored

    def blocks(self) -> Iterator[tuple[str, Tensor | Factors]]:
        """By name, the dense ones first."""
        yield from self.dense.items()
        yield from self.factored.items()

    def within(self, names: Collection[str]) -> Direction:
        """Its blocks of these names."""
        kept = {name: block for name, block in self.dense.items() if name in names}
        return Direction(kept, {name: block for name, block in self.factored.items() if name in names})

    def block(self, name: str) -> Tensor | Factors:
        """One of them."""
        return self.dense[name] if name in self.dense else self.factored[name]


def inner(one: Direction, other: Direction) -> float:
    """``<one, other>`` over the blocks that both have, without building a factored one.

    Dense blocks as in ``sums.py``.
    """
    return sum(_inner(block, other.block(name)) for name, block in one.blocks() if name in other)


def gram_of(directions: Sequence[Direction]) -> Tensor:
    """``<i, j>`` of all pairs; float64, on the CPU."""
    found = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for i, one in enumerate(directions):
        for j in range(i + 1):
            found[i, j] = found[j, i] = inner(one, directions[j])
    return found


class Target(NamedTuple):
    """``tensors``, by name, from which ``scales[i]`` times direction i is to be taken off."""

    tensors: Mapping[str, Tensor]
    scales: Sequence[float]


@torch.no_grad()
def take_off(targets: Sequence[Target], directions: Sequence[Direction]) -> None:
    """``tensors -= sum_i scales[i] * directions[i]`` of every target, in place, at the names that both have.

    A factored block is built once for all targets, a few rows at a time.
    """
    for place, direction in enumerate(directions):
        for name, block in direction.blocks():
            wanted = [(one.tensors[name], one.scales[place]) for one in targets if name in one.tensors]
            wanted = [(tensor, scale) for tensor, scale in wanted if scale]
            if not wanted:
                continue
            if isinstance(block, Tensor):
                for tensor, scale in wanted:
                    tensor.sub_(block.to(tensor.dtype), alpha=scale)
            else:
                _take_off_built([(tensor.flatten(1), scale) for tensor, scale in wanted], block)


def _take_off_built(wanted: Sequence[tuple[Tensor, float]], block: Factors) -> None:
    rows, columns = block.shape
    at_once = max(1, BUILT_AT_ONCE // columns)
    with coarse_matmul():
        for begin in range(0, rows, at_once):
            part = block.D[:, begin : begin + at_once].T @ block.X
            for matrix, scale in wanted:
                matrix[begin : begin + at_once].sub_(part.to(matrix.dtype), alpha=scale)


class JointMove(NamedTuple):
    """``multipliers``: of the directions. ``length``: of the move (Euclidean norm)."""

    multipliers: list[float]
    length: float


def joint_move(gram: Tensor, distances: Sequence[float], longest: float) -> JointMove:
    """The shortest move that takes several linearised distances to zero (``surgery.joint_step``).

    It keeps its direction and is shortened where it would be longer than ``longest``.

    Args:
        gram: inner products of the directions, float64.
    """
    multipliers = joint_step(torch.tensor(distances, dtype=torch.float64), gram)
    length = float((multipliers @ gram @ multipliers).clamp_min(0).sqrt())
    shrink = min(1.0, longest / max(length, 1e-30))
    return JointMove((shrink * multipliers).tolist(), shrink * length)


class Projection(NamedTuple):
    """``scales``: how much of each direction is taken off. ``squared_norm``: of what is left."""

    scales: list[float]
    squared_norm: float


def one_after_another(squared_norm: float, along: Sequence[float], gram: Tensor) -> Projection:
    """Take a gradient's component along each direction off if it is negative, in this order; from inner products alone.

    Args:
        squared_norm: of the gradient.
        along: its inner products with the directions.
        gram: those of the directions, over the blocks that the gradient has.
    """
    scales: list[float] = []
    for i, value in enumerate(along):
        left = value - sum(scale * float(gram[i, j]) for j, scale in enumerate(scales))
        scales.append(left / float(gram[i, i]) if left < 0 and float(gram[i, i]) > 0 else 0.0)
    taken = torch.tensor(scales, dtype=torch.float64)
    rest = squared_norm - 2 * float(taken @ torch.tensor(along, dtype=torch.float64)) + float(taken @ gram @ taken)
    return Projection(scales, max(rest, 0.0))


def _inner(one: Tensor | Factors, other: Tensor | Factors) -> float:
    if isinstance(one, Factors) and isinstance(other, Factors):
        return float(((one.D @ other.D.T) * (one.X @ other.X.T)).sum(dtype=torch.float64))
    if isinstance(one, Factors):
        return _inner(other, one)
    if isinstance(other, Factors):
        with coarse_matmul():
            return float(other.inner(one.flatten(1)))
    return dot(one, other)
