"""The factored gradient against autograd's own dense gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from torch import nn

from trimtab.errors import GuardError
from trimtab.gradients.factors import safety_gradient


def _batch(vocabulary: int) -> torch.Tensor:
    return torch.randint(4, vocabulary, (3, 11), generator=torch.Generator().manual_seed(1))


def _check_against_autograd(model: nn.Module, loss_of) -> None:  # type: ignore[no-untyped-def]
    safety = safety_gradient(model, loss_of)
    model.zero_grad(set_to_none=True)
    loss_of().backward()
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in safety.factored and name not in safety.dense
            continue
        found = safety.factored[name].dense() if name in safety.factored else safety.dense[name]
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)
        probe = torch.randn_like(parameter)
        expected = float((probe.double() * parameter.grad.double()).sum())
        assert float(safety.inner(name, probe)) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        total += float(parameter.grad.double().square().sum())
    assert safety.squared_norm() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_autograd_on_a_whole_model(tied: bool) -> None:
    model = tiny_model(tied=tied).model
    ids = _batch(model.config.vocab_size)
    _check_against_autograd(model, lambda: model(input_ids=ids, labels=ids).loss)


def test_equals_autograd_on_lora_factors() -> None:
    model = get_peft_model(tiny_model().model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = _batch(model.config.vocab_size)
    _check_against_autograd(model, lambda: model(input_ids=ids, labels=ids).loss)


def test_lora_at_its_start_has_no_gradient_in_its_first_factor() -> None:
    """B = 0 at initialisation, so the anchors say nothing about A yet; the guard must cope with empty blocks."""
    model = get_peft_model(tiny_model().model, LoraConfig(r=4, target_modules="all-linear"))
    ids = _batch(model.config.vocab_size)
    safety = safety_gradient(model, lambda: model(input_ids=ids, labels=ids).loss)
    sizes = {name: float(block.squared_norm()) for name, block in safety.factored.items()}
    assert all(size == 0.0 for name, size in sizes.items() if "lora_A" in name)
    assert any(size > 0.0 for name, size in sizes.items() if "lora_B" in name)


def test_leaves_grad_untouched() -> None:
    model = tiny_model().model
    ids = _batch(model.config.vocab_size)
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    safety_gradient(model, lambda: model(input_ids=ids.flip(1), labels=ids).loss)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter.grad, before[name])


def test_rank_is_at_most_the_number_of_tokens() -> None:
    model = tiny_model().model
    ids = _batch(model.config.vocab_size)[:1, :5]
    safety = safety_gradient(model, lambda: model(input_ids=ids, labels=ids).loss)
    assert all(len(block.D) <= 2 * ids.numel() for block in safety.factored.values())  # 2: the tied embedding


def test_parameters_that_the_anchors_do_not_reach_are_absent() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    data = torch.randn(4, 3)
    safety = safety_gradient(model, lambda: model["used"](data).square().mean())
    assert set(safety.factored) == {"used.weight"}
    assert set(safety.dense) == {"used.bias"}
    assert safety.inner("unused.weight", torch.ones(2, 3)) is None


def test_a_frozen_model_raises() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(GuardError, match="no trainable parameter"):
        safety_gradient(model, lambda: model(torch.randn(4, 3)).sum())


def test_a_loss_that_is_not_finite_raises() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(GuardError, match="not finite"):
        safety_gradient(model, lambda: model(torch.randn(4, 3)).sum() * float("nan"))
