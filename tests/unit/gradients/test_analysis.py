"""Spectra, cosines, overlaps and the drift bound against dense NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.gradients.analysis import (
    block_overlap,
    bound,
    cosine,
    effective_rank,
    energy_curve,
    inner,
    matrix_blocks,
    place_of,
    spectra,
)
from trimtab.gradients.factors import Factors, SafetyGradient
from trimtab.gradients.surgery import spf_algorithm1

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]


def _gradient(seed: int, tokens: int = 5) -> SafetyGradient:
    draw = torch.Generator().manual_seed(seed)
    factored = {
        name: Factors(torch.randn(tokens, rows, generator=draw), torch.randn(tokens, columns, generator=draw))
        for name, (rows, columns) in zip(NAMES, [(30, 12), (9, 40)], strict=True)
    }
    dense = {
        "model.norm.weight": torch.randn(7, generator=draw),
        "model.layers.1.router.weight": torch.randn(4, 6, generator=draw),
    }
    return SafetyGradient(1.0, factored, dense)


def _dense(gradient: SafetyGradient) -> dict[str, np.ndarray]:
    found = {name: block.dense().double().numpy() for name, block in gradient.factored.items()}
    return found | {name: block.double().numpy() for name, block in gradient.dense.items()}


def test_spectra_equal_dense_singular_values() -> None:
    gradient = _gradient(0)
    found, whole = spectra(gradient), _dense(gradient)
    assert set(found) == {*NAMES, "model.layers.1.router.weight"} == set(matrix_blocks(gradient))
    for name, values in found.items():
        expected = np.linalg.svd(whole[name], compute_uv=False)
        np.testing.assert_allclose(values.numpy()[: len(expected)], expected[: len(values)], rtol=1e-4, atol=1e-4)
        share = expected**2 / (expected**2).sum()
        np.testing.assert_allclose(energy_curve(values, [1, 3]), [share[0], share[:3].sum()], rtol=1e-4)


def test_cosine_and_inner_equal_flat_vectors() -> None:
    one, other = _gradient(1), _gradient(2, tokens=8)
    a, b = _dense(one), _dense(other)
    x, y = (np.concatenate([side[name].ravel() for name in a]) for side in (a, b))
    assert cosine(one, other) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-4)
    name = NAMES[0]
    assert inner(one, other, name) == pytest.approx((a[name] * b[name]).sum(), rel=1e-4)
    mixed = SafetyGradient(1.0, {}, {name: other.factored[name].dense()})
    assert (
        inner(one, mixed, name)
        == pytest.approx(inner(mixed, one, name))
        == pytest.approx(inner(one, other, name), rel=1e-4)
    )
    assert cosine(one, one) == pytest.approx(1.0, rel=1e-5)


def test_overlap_is_one_with_itself_and_near_chance_for_unrelated_gradients() -> None:
    one, other = _gradient(3), _gradient(4)
    same = block_overlap(one, one, NAMES[0], rank=3)
    assert same.value == pytest.approx(1.0, abs=1e-5) and same.chance == pytest.approx(3 / 30)
    draws = [block_overlap(_gradient(s), _gradient(s + 500), NAMES[0], rank=3).value for s in range(40)]
    assert np.mean(draws) == pytest.approx(0.1, abs=0.03)
    assert 0 <= block_overlap(one, other, NAMES[1], 3, "right").value <= 1


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.ones(6)) == pytest.approx(6.0)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_bound_holds_after_algorithm_1_and_its_parts_are_the_formula(rank: int) -> None:
    safety = _gradient(6)
    task = {name: torch.from_numpy(-block).float() for name, block in _dense(safety).items()}
    draw = torch.Generator().manual_seed(9)
    task = {
        name: g + 0.5 * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=draw) for name, g in task.items()
    }
    applied = {**task, **spf_algorithm1(task, safety, rank).gradients}
    found = bound(applied, safety, rank, lr=0.1)
    whole = _dense(safety)
    exact = -0.1 * sum((whole[name] * applied[name].double().numpy()).sum() for name in whole)
    tails = {
        name: (np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)[rank:] ** 2).sum() for name, w in whole.items()
    }
    by_block = 0.1 * sum(np.sqrt(tails[n]) * np.linalg.norm(applied[n].double().numpy()) for n in whole)
    assert found.first_order == pytest.approx(exact, rel=1e-3, abs=1e-4)
    assert found.by_block == pytest.approx(by_block, rel=1e-3, abs=1e-4)
    assert abs(found.first_order) <= found.by_block * (1 + 1e-4) + 1e-6
    assert found.by_block <= found.overall * (1 + 1e-6)


def test_places() -> None:
    assert place_of("model.layers.12.mlp.up_proj.weight") == (12, "up_proj")
    assert place_of("transformer.h.3.attn.c_attn.weight") == (3, "c_attn")
    assert place_of("model.embed_tokens.weight").depth == -1
    lora = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight"
    assert place_of(lora) == (2, "q_proj/lora_A")
