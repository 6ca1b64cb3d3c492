"""Algorithm 1 and its parts against an oracle written in NumPy from the formulas, and the invariants of the method."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.gradients.factors import Factors, SafetyGradient
from trimtab.gradients.subspace import basis_of_factors, basis_of_matrix, energy_ratio, overlap, principal_cosines
from trimtab.gradients.surgery import conflict, joint_step, project_out, remove_direction, spf_algorithm1

SHAPES = {"a.weight": (30, 12), "b.weight": (9, 40), "norm": (17,)}


def _problem(seed: int, tokens: int = 6, sign: float = -1.0) -> tuple[dict[str, Tensor], SafetyGradient]:
    """Random factors and a task gradient that conflicts (sign -1) or agrees (sign +1) with them."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.logspace(1.5, 0, tokens)[:, None]  # singular values far apart: k = 1 has one right answer
    factored, dense, task = {}, {}, {}
    for name, shape in SHAPES.items():
        if len(shape) == 2:
            factored[name] = Factors(
                spread * torch.randn(tokens, shape[0], generator=draw), torch.randn(tokens, shape[1], generator=draw)
            )
            full = factored[name].dense()
        else:
            dense[name] = full = torch.randn(shape, generator=draw)
        task[name] = sign * full + torch.randn(shape, generator=draw)
    return task, SafetyGradient(loss=1.0, factored=factored, dense=dense)


def _numpy_algorithm1(task: dict[str, Tensor], safety: SafetyGradient, k: int) -> dict[str, np.ndarray]:
    """Algorithm 1 as the paper's port states it: dense gradients, dense SVD, float64."""
    whole = {name: block.dense().double().numpy() for name, block in safety.factored.items()}
    whole |= {name: block.double().numpy() for name, block in safety.dense.items()}
    mine = {name: gradient.double().numpy() for name, gradient in task.items()}
    if sum((mine[name] * whole[name]).sum() for name in whole) >= 0:
        return mine
    result = {}
    for name, gradient in mine.items():
        matrix, flat = whole[name].reshape(whole[name].shape[0], -1), gradient.reshape(gradient.shape[0], -1)
        U = np.linalg.svd(matrix, full_matrices=False)[0][:, : min(k, *matrix.shape)]
        result[name] = (flat - U @ (U.T @ flat)).reshape(gradient.shape)
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 6])
def test_algorithm1_equals_the_numpy_oracle(seed: int, k: int) -> None:
    task, safety = _problem(seed)
    result = spf_algorithm1(task, safety, rank=k)
    expected = _numpy_algorithm1(task, safety, k)
    assert result.conflict < 0 and set(result.gradients) == set(task)
    for name, gradient in result.gradients.items():
        np.testing.assert_allclose(gradient.numpy(), expected[name], atol=1e-5 * float(task[name].norm()))


def test_without_a_global_conflict_nothing_changes_even_where_one_block_conflicts() -> None:
    task, safety = _problem(0, sign=1.0)
    task["norm"] = -task["norm"]
    result = spf_algorithm1(task, safety)
    assert result.conflict > 0 and float(safety.inner("norm", task["norm"])) < 0
    assert result.gradients == {} and result.projected == 0 and result.removed == 0.0


@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_projection_never_raises_the_norm_and_is_orthogonal(seed: int, k: int) -> None:
    task, safety = _problem(seed)
    result = spf_algorithm1(task, safety, rank=k)
    for name, gradient in result.gradients.items():
        assert float(gradient.norm()) <= float(task[name].norm()) * (1 + 1e-6)
    for name, block in safety.factored.items():
        U = basis_of_factors(block, k).U
        assert float((U.T @ result.gradients[name]).abs().max()) < 1e-5 * max(1.0, float(task[name].norm()))
    assert 0.0 <= result.removed <= 1.0


def test_arguments_are_not_changed() -> None:
    task, safety = _problem(3)
    before = {name: gradient.clone() for name, gradient in task.items()}
    spf_algorithm1(task, safety)
    assert all(torch.equal(task[name], before[name]) for name in task)


def test_in_place_it_edits_the_task_itself_to_the_same_values() -> None:
    """Contiguous float32 blocks are projected where they lie; a transposed one and a half one are written back."""
    task, safety = _problem(3)
    expected = {name: gradient.double() for name, gradient in spf_algorithm1(task, safety).gradients.items()}
    first = next(iter(safety.factored))
    task[first] = task[first].T.contiguous().T
    assert not task[first].is_contiguous()
    places = {name: gradient.data_ptr() for name, gradient in task.items()}
    result = spf_algorithm1(task, safety, in_place=True)
    for name, gradient in task.items():
        assert gradient.data_ptr() == places[name] and result.gradients[name] is gradient
        torch.testing.assert_close(gradient.double(), expected[name], atol=1e-5, rtol=1e-5)
    half = {name: gradient.bfloat16() for name, gradient in _problem(3)[0].items()}
    pure = spf_algorithm1(half, safety).gradients
    spf_algorithm1(half, safety, in_place=True)
    assert all(torch.equal(half[name], pure[name]) and pure[name].dtype == torch.bfloat16 for name in half)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_removed_is_what_is_missing(seed: int) -> None:
    task, safety = _problem(seed)
    result = spf_algorithm1(task, safety, rank=2)
    before = sum(float(task[name].double().square().sum()) for name in task)
    lost = sum(float((task[name] - edited).double().square().sum()) for name, edited in result.gradients.items())
    assert 0.01 < result.removed < 1 and result.removed == pytest.approx((lost / before) ** 0.5, rel=1e-4)


def test_scaling_the_task_gradient_changes_no_decision() -> None:
    task, safety = _problem(4)
    small = spf_algorithm1(task, safety)
    large = spf_algorithm1({name: g * 2.0**16 for name, g in task.items()}, safety)
    for name in task:
        torch.testing.assert_close(large.gradients[name], small.gradients[name] * 2.0**16, rtol=1e-4, atol=0.5)


def test_a_block_whose_rank_reaches_its_rows_is_not_deleted() -> None:
    """LoRA's A factor (r x in) with k >= r: U U^T would be the identity and the block's gradient would vanish."""
    draw = torch.Generator().manual_seed(0)
    block = Factors(torch.randn(50, 4, generator=draw), torch.randn(50, 60, generator=draw))
    task = {"lora_A": -block.dense() + torch.randn(4, 60, generator=draw)}
    result = spf_algorithm1(task, SafetyGradient(loss=1.0, factored={"lora_A": block}), rank=20)
    left = result.gradients["lora_A"]
    assert float(left.norm()) > 0.1 * float(task["lora_A"].norm())
    scale = float(left.norm() * block.dense().norm())
    assert abs(float((left.double() * block.dense().double()).sum())) < 1e-5 * scale


def test_a_block_without_safety_gradient_keeps_its_task_gradient() -> None:
    task, safety = _problem(1)
    task["unreached"] = torch.ones(3)
    zero = Factors(torch.zeros(2, 5), torch.zeros(2, 4))
    safety = SafetyGradient(1.0, {**safety.factored, "empty": zero}, safety.dense)
    task["empty"] = torch.ones(5, 4)
    result = spf_algorithm1(task, safety)
    assert "unreached" not in result.gradients and "empty" not in result.gradients


def test_nothing_shared_raises_instead_of_doing_nothing() -> None:
    _, safety = _problem(0)
    with pytest.raises(GuardError, match="share no parameter"):
        conflict({"elsewhere": torch.ones(3)}, safety)


def test_a_gradient_that_is_not_finite_raises() -> None:
    task, safety = _problem(0)
    task["norm"][0] = float("inf")
    with pytest.raises(GuardError, match="not finite"):
        spf_algorithm1(task, safety)


@pytest.mark.parametrize("side", ["left", "right"])
def test_exact_basis_equals_dense_svd(side: str) -> None:
    draw = torch.Generator().manual_seed(2)
    block = Factors(torch.randn(7, 30, generator=draw), torch.randn(7, 20, generator=draw))
    dense = block.dense().double().numpy()
    left, values, right = np.linalg.svd(dense)
    expected = (left if side == "left" else right.T)[:, :5]
    found = basis_of_factors(block, 5, side)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.singular_values[:7].numpy(), values[:7], rtol=1e-5)
    np.testing.assert_allclose(found.U.numpy() @ found.U.numpy().T, expected @ expected.T, atol=1e-5)


def test_basis_has_only_real_directions() -> None:
    one = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    block = Factors(one.repeat(6, 1), torch.ones(6, 10))
    assert basis_of_factors(block, 20).U.shape == (30, 1)
    assert basis_of_matrix(torch.zeros(4, 4), 2).U.shape == (4, 0)
    assert basis_of_matrix(torch.arange(1.0, 5.0), 20).U.shape == (4, 1)


def test_energy_ratio_overlap_and_angles() -> None:
    assert energy_ratio(torch.tensor([2.0, 1.0, 1.0]), 1) == pytest.approx(4 / 6)
    assert energy_ratio(torch.zeros(3), 1) == 0.0
    identity = torch.eye(6)
    assert overlap(identity[:, :2], identity[:, :4]) == pytest.approx(1.0)
    assert overlap(identity[:, :2], identity[:, 2:4]) == pytest.approx(0.0)
    angle = torch.tensor(0.3)
    turned = torch.stack([torch.cos(angle) * identity[:, 0] + torch.sin(angle) * identity[:, 1]], 1)
    torch.testing.assert_close(principal_cosines(identity[:, :1], turned), torch.cos(angle)[None])


def test_joint_step_is_polyak_s_for_one_loss() -> None:
    g, x = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    loss = g @ x
    after = x - float(joint_step(loss[None], torch.tensor([[25.0]]))[0]) * g
    assert float(g @ after) == pytest.approx(0.0, abs=0.01)
    assert float(joint_step(torch.tensor([0.0]), torch.tensor([[25.0]]))[0]) == 0.0
    assert float(joint_step(torch.tensor([1.0]), torch.tensor([[0.0]]))[0]) == 0.0


@given(seed=st.integers(0, 10_000), hundredths=st.integers(-90, 90), second_is_calm=st.booleans())
@settings(max_examples=60, deadline=None)
def test_joint_step_equals_a_quadratic_programme(seed: int, hundredths: int, second_is_calm: bool) -> None:
    """min ||d||^2 subject to <g_i, d> <= -loss_i, solved by SciPy; a loss of zero may fall and may not rise."""
    from scipy.optimize import minimize

    draw, opposed = np.random.default_rng(seed), hundredths / 100
    first = draw.normal(size=6)
    second = opposed * first + np.sqrt(1 - opposed**2) * draw.normal(size=6)
    G, losses = np.stack([first, second]), draw.uniform(0.1, 2.0, size=2)
    losses[1] *= not second_is_calm
    assume(np.linalg.cond(G @ G.T) < 80)  # the ridge of 1e-3 bends the solution by half its condition number
    rows = [{"type": "ineq", "fun": lambda d, i=i: -losses[i] - G[i] @ d} for i in range(2)]
    best = minimize(lambda d: d @ d, np.zeros(6), jac=lambda d: 2 * d, constraints=rows, method="SLSQP").x
    found = -joint_step(torch.tensor(losses), torch.tensor(G @ G.T)).numpy() @ G
    assert np.linalg.norm(found - best) < 0.05 * np.linalg.norm(best) + 1e-6


def test_joint_step_leaves_out_a_loss_that_is_served_anyway() -> None:
    """Two nearly equal gradients: moving for the larger loss lowers the smaller one by more than it needs."""
    gram = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    multipliers = joint_step(torch.tensor([1.0, 0.1]), gram)
    assert float(multipliers[1]) == 0.0 and float(multipliers[0]) == pytest.approx(1.0, rel=2e-3)


def test_remove_direction_and_project_out_agree_for_one_column() -> None:
    draw = torch.Generator().manual_seed(5)
    g, d = torch.randn(8, generator=draw), torch.randn(8, generator=draw)
    one, other = remove_direction(g, d), project_out(g, (d / d.norm())[:, None])
    torch.testing.assert_close(one.kept, other.kept, atol=1e-6, rtol=1e-5)
    assert one.removed == pytest.approx(float(g.square().sum() - one.kept.square().sum()), rel=1e-4)
    assert other.removed == pytest.approx(one.removed, rel=1e-4)
    assert torch.equal(remove_direction(g, torch.zeros(8)).kept, g)


@pytest.mark.parametrize(
    "asked",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.fp32_precision = 'tf32'",  # what Transformers does with tf32: true
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_tf32_is_off_inside_and_restored_however_it_was_set(asked: str) -> None:
    """In a process of its own: PyTorch refuses one way of asking after the other."""
    script = f"""
import torch
from trimtab.gradients.surgery import coarse_matmul, full_precision_matmul
{asked}
switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
before = [switch.fp32_precision for switch in switches]
with full_precision_matmul():
    assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
    with coarse_matmul():
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
assert [switch.fp32_precision for switch in switches] == before
torch.backends.fp32_precision = "ieee"  # a later setting is not held back
if "fp32_precision" in {asked!r} and "cuda" not in {asked!r}:
    assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
