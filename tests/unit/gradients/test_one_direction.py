"""A-GEM, PCGrad, SafeGrad and the per-tensor rule against flat-vector oracles in NumPy, and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.one_direction import agem, inner, pcgrad, per_tensor, safegrad

SHAPES = {"a": (7, 5), "b": (11,), "c": (3, 4)}


def _problem(seed: int, opposed: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    anchor = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    task = {name: -opposed * g + torch.randn(g.shape, generator=draw) for name, g in anchor.items()}
    return task, anchor


def _flat(gradients: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([gradients[name].double().numpy().ravel() for name in SHAPES])


def _after(task: dict[str, Tensor], edited: dict[str, Tensor]) -> np.ndarray:
    return _flat({**task, **edited})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("opposed", [1.0, -1.0, 0.0])
def test_agem_is_equation_11(seed: int, opposed: float) -> None:
    task, anchor = _problem(seed, opposed)
    g, r = _flat(task), _flat(anchor)
    expected = g - min(g @ r, 0.0) / (r @ r) * r
    np.testing.assert_allclose(_after(task, agem(task, anchor).gradients), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("opposed", [1.0, -1.0])
def test_pcgrad_deconflicts_both_with_the_originals_and_adds(seed: int, opposed: float) -> None:
    task, anchor = _problem(seed, opposed)
    g, r = _flat(task), _flat(anchor)
    value = min(g @ r, 0.0)
    expected = (g - value / (r @ r) * r) + (r - value / (g @ g) * g)
    np.testing.assert_allclose(_after(task, pcgrad(task, anchor).gradients), expected, atol=1e-5)


@pytest.mark.parametrize("opposed", [1.0, -1.0])
def test_safegrad_projects_and_then_adds_rho_times_the_anchor(opposed: float) -> None:
    task, anchor = _problem(5, opposed)
    g, r = _flat(task), _flat(anchor)
    expected = g - min(g @ r, 0.0) / (r @ r) * r + 0.7 * r
    np.testing.assert_allclose(_after(task, safegrad(task, anchor, rho=0.7).gradients), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_per_tensor_is_the_released_loop(seed: int) -> None:
    task, anchor = _problem(seed)
    task["b"], anchor["c"] = anchor["b"].clone(), torch.full(SHAPES["c"], 1e-6)
    task["c"] = -torch.ones(SHAPES["c"])
    edited = per_tensor(task, anchor)
    for name in SHAPES:
        gu, gs = task[name].double().numpy(), anchor[name].double().numpy()
        dot, q = (gu * gs).sum(), (gs * gs).sum()
        expected = gu - dot / q * gs if q > 1e-8 and dot < 0 else gu
        np.testing.assert_allclose(edited.gradients.get(name, task[name]).numpy(), expected, atol=1e-5)
    assert edited.disabled == 1 and edited.projected == 1


@given(seed=st.integers(0, 5_000))
@settings(max_examples=40, deadline=None)
def test_after_per_tensor_surgery_no_tensor_conflicts(seed: int) -> None:
    task, anchor = _problem(seed, 0.2)
    after = {**task, **per_tensor(task, anchor).gradients}
    for name in SHAPES:
        scale = float(task[name].norm() * anchor[name].norm())
        assert inner({name: after[name]}, {name: anchor[name]}) >= -1e-5 * scale


def test_a_tensor_without_an_anchor_gradient_keeps_its_own_and_one_without_a_task_gradient_gets_the_anchor_s() -> None:
    task, anchor = _problem(0)
    only_anchor = anchor["c"]
    del anchor["b"], task["c"]
    assert "b" not in per_tensor(task, anchor).gradients and "b" not in agem(task, anchor).gradients
    added = safegrad(task, {**anchor, "c": only_anchor}).gradients
    assert torch.equal(added["c"], only_anchor) and torch.equal(added["b"], task["b"])


def test_scaling_the_task_gradient_changes_no_decision() -> None:
    task, anchor = _problem(1)
    large = {name: g * 2.0**16 for name, g in task.items()}
    for rule in (agem, per_tensor):
        small, big = rule(task, anchor).gradients, rule(large, anchor).gradients
        assert small.keys() == big.keys()
        for name in small:
            torch.testing.assert_close(big[name], small[name] * 2.0**16, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("rule", [agem, per_tensor, pcgrad, safegrad])
def test_arguments_stay_and_nothing_shared_or_not_finite_raises(rule: object) -> None:
    task, anchor = _problem(2)
    before = [{name: g.clone() for name, g in side.items()} for side in (task, anchor)]
    rule(task, anchor)  # type: ignore[operator]
    assert all(torch.equal(side[n], old[n]) for side, old in zip((task, anchor), before, strict=True) for n in side)
    with pytest.raises(GuardError, match="share no parameter"):
        rule({"x": torch.ones(2)}, {"y": torch.ones(2)})  # type: ignore[operator]
    task["a"][0, 0] = float("nan")
    with pytest.raises(GuardError, match="not finite"):
        rule(task, anchor)  # type: ignore[operator]
