"""Where training computes in bfloat16: what was asked for, else what the device does natively."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import tiny_model

from trimtab import precision


def type_of_product(bf16: bool | None) -> torch.dtype:
    one = torch.ones(2, 2)
    with precision.training_scope(torch.device("cpu"), bf16):
        return (one @ one).dtype


@pytest.mark.parametrize("native", [True, False])
def test_what_is_asked_for_wins_and_the_processor_decides_the_rest(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: native)
    assert type_of_product(True) == torch.bfloat16
    assert type_of_product(False) == torch.float32
    assert type_of_product(None) == (torch.bfloat16 if native else torch.float32)


def test_a_device_without_an_answer_of_its_own_stays_in_float32() -> None:
    with precision.training_scope(torch.device("mps"), None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def loss_and_gradients(model: PeftModel) -> tuple[float, list[torch.Tensor]]:
    rows = torch.tensor([[2, 5, 7, 9, 11, 3], [2, 6, 8, 10, 12, 3]])
    model.zero_grad(set_to_none=True)
    with precision.training_scope(torch.device("cpu"), True):
        loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return float(loss.detach()), [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_train_with_the_same_numbers_and_everything_is_as_before_afterwards(tied: bool) -> None:
    loaded = tiny_model(tied=tied)
    loaded.model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {name: (one, one.detach().clone()) for name, one in model.named_parameters()}
    expected_loss, expected = loss_and_gradients(model)
    base = model.get_base_model()
    with precision.adapters_train(model, torch.device("cpu"), True):
        assert base.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
        assert base.get_input_embeddings().weight.dtype == torch.float32
        assert base.config._attn_implementation == "eager"
        loss, gradients = loss_and_gradients(model)
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    for found, wanted in zip(gradients, expected, strict=True):  # bfloat16 keeps 8 bits of each factor
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    for name, (parameter, values) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values)
    assert base.config._attn_implementation == "sdpa"
    assert (base.lm_head.weight is base.get_input_embeddings().weight) is tied
    assert loss_and_gradients(model)[0] == expected_loss


def test_everything_is_as_before_after_an_error_too() -> None:
    model = get_peft_model(tiny_model().model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="stop"), precision.adapters_train(model, torch.device("cpu"), True):
        raise ValueError("stop")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_in_float32_nothing_changes() -> None:
    model = get_peft_model(tiny_model().model, LoraConfig(r=4, target_modules="all-linear"))
    with precision.adapters_train(model, torch.device("cpu"), False):
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
