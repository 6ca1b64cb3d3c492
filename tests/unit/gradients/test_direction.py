"""Directions of dense and factored blocks against NumPy on the whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.gradients import direction as module
from trimtab.gradients.direction import Direction, Target, gram_of, inner, joint_move, one_after_another, take_off
from trimtab.gradients.factors import Factors

SHAPES = {"wide": (300, 40), "tall": (20, 500), "bias": (7,)}


def _direction(seed: int, factored: tuple[str, ...]) -> tuple[Direction, dict[str, np.ndarray]]:
    """One of five tokens, and the same as whole float64 blocks."""
    draw = torch.Generator().manual_seed(seed)
    dense: dict[str, Tensor] = {}
    factors: dict[str, Factors] = {}
    for name, shape in SHAPES.items():
        if len(shape) == 1:
            dense[name] = torch.randn(shape, generator=draw)
            continue
        both = Factors(*(torch.randn(5, size, generator=draw) for size in shape))
        if name in factored:
            factors[name] = both
        else:
            dense[name] = both.dense()
    whole = {name: block.double().numpy() for name, block in dense.items()}
    whole |= {name: both.D.double().numpy().T @ both.X.double().numpy() for name, both in factors.items()}
    return Direction(dense, factors), whole


@pytest.mark.parametrize("other_factored", [(), ("wide",), ("tall",), ("wide", "tall")])
def test_inner_products_are_those_of_the_whole_blocks(other_factored: tuple[str, ...]) -> None:
    one, whole = _direction(0, ("wide",))
    other, whole_other = _direction(1, other_factored)
    expected = sum(float(np.vdot(whole[name], whole_other[name])) for name in SHAPES)
    scale = np.sqrt(sum(float((block**2).sum()) for side in (whole, whole_other) for block in side.values()))
    assert abs(inner(one, other) - expected) < 1e-5 * scale
    assert inner(one, other) == pytest.approx(inner(other, one), rel=1e-5)


def test_a_block_that_only_one_has_adds_nothing() -> None:
    one, whole = _direction(0, ("wide",))
    alone = Direction({"bias": torch.ones(7), "other": torch.ones(3)})
    assert inner(alone, one) == pytest.approx(float(whole["bias"].sum()), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("at_once", [1, 4000, 1 << 22])
def test_taking_off_changes_all_targets_in_place(
    dtype: torch.dtype, tolerance: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows of a factored block are built at a time."""
    monkeypatch.setattr(module, "BUILT_AT_ONCE", at_once)
    (first, whole_first), (second, whole_second) = _direction(0, ("wide",)), _direction(1, ("wide", "tall"))
    draw = torch.Generator().manual_seed(2)
    targets = []
    for scales in ([0.25, 0.0], [-0.5, 0.125]):
        targets.append(Target({name: torch.randn(SHAPES[name], generator=draw).to(dtype) for name in SHAPES}, scales))
    before = [{name: tensor.double().numpy().copy() for name, tensor in one.tensors.items()} for one in targets]
    own = [{name: tensor.data_ptr() for name, tensor in one.tensors.items()} for one in targets]
    take_off(targets, [first, second])
    for one, old, place in zip(targets, before, own, strict=True):
        for name, tensor in one.tensors.items():
            assert tensor.data_ptr() == place[name] and tensor.dtype == dtype
            expected = old[name] - one.scales[0] * whole_first[name] - one.scales[1] * whole_second[name]
            np.testing.assert_allclose(tensor.double().numpy(), expected, atol=tolerance, rtol=tolerance)


def test_a_joint_move_is_the_same_from_factors() -> None:
    moved = []
    for factored in ((), ("wide", "tall")):
        directions = [_direction(seed, factored)[0] for seed in (0, 1)]
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        move = joint_move(gram_of(directions), [0.7, 0.4], longest=1e9)
        take_off([Target(tensors, move.multipliers)], directions)
        squared = sum(float(tensor.square().sum()) for tensor in tensors.values())
        assert move.length == pytest.approx(squared**0.5, rel=1e-4)
        moved.append(tensors)
    for name in SHAPES:
        torch.testing.assert_close(moved[0][name], moved[1][name], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_components_against_each_direction_go_one_after_another(seed: int) -> None:
    """From inner products alone, as NumPy does it on the vectors."""
    draw = np.random.default_rng(seed)
    directions = draw.normal(size=(3, 6))
    gradient = left = draw.normal(size=6)
    found = one_after_another(
        float(gradient @ gradient), (directions @ gradient).tolist(), torch.tensor(directions @ directions.T)
    )
    for direction in directions:
        left = left - min(left @ direction, 0.0) / (direction @ direction) * direction
    np.testing.assert_allclose(gradient - np.array(found.scales) @ directions, left, atol=1e-12)
    assert found.squared_norm == pytest.approx(float(left @ left), rel=1e-9)
