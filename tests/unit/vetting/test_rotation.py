"""Other coordinates, the same function: against the model before, NumPy, and what is known of Hadamard matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.approximation.families import family, token_rows

from trimtab.approximation.apply import approximate
from trimtab.approximation.quantization import round_symmetric
from trimtab.errors import ModelError
from trimtab.vetting.rotation import best_scale, orthogonal, rotate

ROWS = token_rows(4, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor(ROWS)).logits
    return found


def with_gains(name: str) -> Any:
    """A family's model whose norms have gains, one of them a giant, and whose maps have biases that are not zero."""
    model = family(name)
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 40.0
    return model


@pytest.mark.parametrize("size", [1, 6, 9, 32, 48, 576])
def test_the_basis_is_orthogonal_and_spreads(size: int) -> None:
    basis = orthogonal(size, 7).numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-12)
    if size & (size - 1) == 0:  # a Hadamard matrix: every entry has the same magnitude
        np.testing.assert_allclose(np.abs(basis), size**-0.5)
    assert not np.allclose(orthogonal(32, 7), orthogonal(32, 8))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen2.5", "qwen3", "phi3"])
def test_the_model_stays_the_same_function(name: str) -> None:
    model = with_gains(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    done = rotate(model, ROWS, seed=2)
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    assert done.gap < 1e-4
    assert done.untied is (name == "qwen2.5")
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert any("down_proj" in key for key in changed) and any("embed" in key for key in changed)
    assert all(after <= before for before, after in done.errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_every_weight_is_rounded_once_more(dtype: torch.dtype) -> None:
    model = family("llama").to(dtype)
    before = logits(model).float()
    done = rotate(model, ROWS)
    assert 0 < done.gap < 16 * torch.finfo(dtype).eps
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    error = (logits(model).float() - before).norm() / before.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_it_comes_back_from_a_file(tmp_path: Any) -> None:
    model = with_gains("qwen2.5")
    rotate(model, ROWS)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), atol=0.0, rtol=0.0)


def test_what_an_outlier_did_to_rounding_is_undone() -> None:
    """The gain of 40 makes one channel set every token's step; spread over all channels it does not."""
    model = with_gains("llama")
    exact = logits(model)

    def error() -> float:
        with approximate(model, "a4"):
            return float((logits(model) - exact).square().mean())

    before = error()
    rotate(model, ROWS)
    assert error() < 0.8 * before


def test_the_scale_is_the_best_of_those_tried_and_ones_where_nothing_is_better() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    sizes = torch.logspace(-1, 1, 16)
    inputs = torch.randn(64, 16) * sizes
    scale, before, after = best_scale(inputs, weight)
    exact = (inputs.double() @ weight.double().T).numpy()
    for given, error in ((torch.ones(16), before), (scale, after)):
        rounded = (round_symmetric(inputs / given, 4) * given).double() @ weight.double().T
        share = ((rounded.numpy() - exact) ** 2).sum(-1) / (exact**2).sum(-1)
        assert error == pytest.approx(share.mean(), rel=1e-3)
    assert after < before
    whole = torch.randint(-7, 8, (64, 16)).float()
    whole[:, 0] = 7.0  # on the grid already: rounding does nothing
    scale, before, after = best_scale(whole, weight)
    assert before == after == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(scale, torch.ones(16))


@pytest.mark.parametrize(
    ("name", "why"), [("mixtral", "experts"), ("gemma2", "norms after a block"), ("gemma3", "norms after a block")]
)
def test_what_cannot_be_rotated_is_refused_and_left_as_it_was(name: str, why: str) -> None:
    model = family(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match="cannot be rotated") as error:
        rotate(model, ROWS)
    assert why in str(error.value)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_an_adapter_is_refused() -> None:
    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ModelError, match="cannot be rotated"):
        rotate(model.get_base_model(), ROWS)


def test_a_model_that_is_not_the_same_afterwards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm with a centre, as LayerNorm: no basis but the given one will do."""
    model = family("llama")
    norm = type(model.model.norm)
    given = norm.forward
    monkeypatch.setattr(
        norm,
        "forward",
        lambda self, x: given(self, x - x.mean(-1, keepdim=True)) if x.shape[-2] > 1 else given(self, x),
    )
    with pytest.raises(ModelError, match="not the same after rotating"):
        rotate(model, ROWS)
