"""The closed form against dense NumPy, and its parts against definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model

from trimtab.anchors import Anchor
from trimtab.errors import GuardError
from trimtab.patching.adapters import Workbench, attach
from trimtab.patching.lowrank import (
    WeightGradient,
    inner,
    joined,
    measured_rank,
    truncated_step,
    weight_gradient,
)
from trimtab.tuning.pools import reader_for, tokenise

SAMPLE = Anchor("how to steal a bomb", "refuse", "sorry i can help with that")
OTHER = Anchor("bake a cake", "answer", "sure here is how to bake the cake")


def _gradient(bench: Workbench, anchor: Anchor) -> WeightGradient:
    row = tokenise(bench.loaded, anchor, None, None)
    return weight_gradient(bench, lambda: reader_for(bench.loaded, bench.model).losses([row]).mean())


def _dense(anchor: Anchor) -> dict[str, np.ndarray]:
    """The gradient with respect to the plain weights, by autograd."""
    loaded = tiny_model()
    row = tokenise(loaded, anchor, None, None)
    reader_for(loaded, loaded.model).losses([row]).mean().backward()
    return {f"base_model.model.{n.removesuffix('.weight')}": p.grad.numpy() for n, p in loaded.model.named_parameters()
            if p.grad is not None and p.ndim == 2}  # fmt: skip


def test_the_gradient_is_that_of_the_effective_weight() -> None:
    bench = attach(tiny_model())
    found, expected = _gradient(bench, SAMPLE), _dense(SAMPLE)
    assert set(found.blocks) == set(bench.layers)
    for name, block in found.blocks.items():
        np.testing.assert_allclose(block.dense().numpy(), expected[name], atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_truncated_step_is_numpys_truncated_svd(rank: int) -> None:
    changes = truncated_step(_gradient(attach(tiny_model()), SAMPLE), rank, 0.25)
    for name, G in _dense(SAMPLE).items():
        if name in changes:
            U, S, V = np.linalg.svd(G)
            expected = -0.25 * (U[:, :rank] * S[:rank]) @ V[:rank]
            np.testing.assert_allclose((changes[name].B @ changes[name].A).numpy(), expected, atol=1e-6)


def test_a_small_step_lowers_the_loss_by_the_squared_norm_to_first_order() -> None:
    bench = attach(tiny_model(), rank=20, alpha=20)
    gradient = _gradient(bench, SAMPLE)
    step = 1e-3
    bench.place(truncated_step(gradient, 20, step))
    fallen = gradient.loss - _gradient(bench, SAMPLE).loss
    assert fallen == pytest.approx(step * gradient.squared_norm(), rel=0.05)


def test_inner_products_and_joined_gradients_match_dense_ones() -> None:
    bench = attach(tiny_model())
    one, two = _gradient(bench, SAMPLE), _gradient(bench, OTHER)
    expected = sum(float((one.blocks[n].dense().double() * two.blocks[n].dense().double()).sum()) for n in one.blocks)
    assert inner(one, two) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    both = joined([one, two], [1.0, 0.0])
    scale = 1.0 / (one.squared_norm() * 1.001)  # the solver's ridge is a thousandth
    for name, block in both.blocks.items():
        torch.testing.assert_close(block.dense(), scale * one.blocks[name].dense(), rtol=2e-3, atol=1e-6)


def test_measured_rank_is_bounded_by_tokens_and_matches_numpy() -> None:
    found = measured_rank(_gradient(attach(tiny_model()), SAMPLE), ks=(1, 5))
    spectra = [np.linalg.svd(G, compute_uv=False) for n, G in _dense(SAMPLE).items() if "embed" not in n]
    total = sum(float((s**2).sum()) for s in spectra)
    assert found.energy[5] == pytest.approx(sum(float((s[:5] ** 2).sum()) for s in spectra) / total, rel=1e-4)
    assert 0 < found.energy[1] <= found.energy[5] <= 1
    assert found.needed[0.9] <= found.needed[0.99] <= found.tokens


def test_a_loss_that_is_not_finite_raises() -> None:
    bench = attach(tiny_model())
    with pytest.raises(GuardError, match="not finite"):
        weight_gradient(bench, lambda: bench.model(input_ids=torch.tensor([[2, 5]])).logits.sum() * float("nan"))
