"""Scales are made from weights as numbers: packed ones are unpacked or refused, never read as bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.unit.approximation.families import family, token_rows
from tests.unit.patching import worlds
from torch import Tensor, nn

from trimtab import approximate
from trimtab.approximation import quantization
from trimtab.approximation.sites import find_sites
from trimtab.approximation.weights import dense_weight
from trimtab.errors import ApproximationError

IDS = torch.tensor(token_rows(2, 10))
CALIBRATION = token_rows(6, 16, seed=1)


class Packed(nn.Module):
    """A linear map of no known library: 8-bit rows and their scales, unpacked in ``forward``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scales", scale)
        self.bias = bias

    def meant(self) -> Tensor:
        return self.qweight.float() * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.meant().to(x.dtype), self.bias)


class Clipped(Packed):
    """Not linear in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-0.2, 0.2))


def replaced(model: Any, kind: type[Packed]) -> Any:
    """Every map of the decoder layers packed."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, kind(child.weight.detach()))
    return model


def test_plain_half_and_adapted_weights_are_taken_as_they_are() -> None:
    plain = nn.Linear(6, 4)
    assert dense_weight(plain).data_ptr() == plain.weight.data_ptr()
    assert dense_weight(plain.bfloat16()).dtype == torch.bfloat16
    wrapped = get_peft_model(family("llama"), LoraConfig(r=2, target_modules="all-linear"))
    adapted = wrapped.get_base_model().model.layers[0].mlp.gate_proj
    assert torch.equal(dense_weight(adapted), adapted.base_layer.weight)


def test_any_linear_layer_is_read_through_its_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.approximation.weights.CHUNK", 7)
    packed = Packed(torch.randn(12, 24), bias=torch.randn(12))
    torch.testing.assert_close(dense_weight(packed), packed.meant(), rtol=1e-5, atol=1e-5)

    class HalfOnly(Packed):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float16:
                raise RuntimeError("this kernel takes half precision")
            return super().forward(x)

    half = HalfOnly(torch.randn(12, 24))
    torch.testing.assert_close(dense_weight(half), half.meant(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["smoothquant:8", "omniquant:8", "omniquant:4,steps=2"])
def test_packed_layers_get_the_scales_of_their_weights(name: str) -> None:
    packed = replaced(family("llama"), Packed)
    plain = family("llama")
    for one, other in zip(packed.model.layers, plain.model.layers, strict=True):
        for block in ("self_attn", "mlp"):
            for key, child in getattr(one, block).named_children():
                if isinstance(child, Packed):
                    getattr(getattr(other, block), key).weight.data = child.meant()
    with torch.no_grad():
        before = packed(input_ids=IDS).logits
        with approximate(packed, name, calibration_rows=CALIBRATION):
            seen = packed(input_ids=IDS).logits
        with approximate(plain, name, calibration_rows=CALIBRATION):
            wanted = plain(input_ids=IDS).logits
        assert not torch.equal(seen, before) and torch.equal(packed(input_ids=IDS).logits, before)
    assert float((seen - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["smoothquant:8", "omniquant:8"])
def test_what_cannot_be_read_is_refused_by_class_with_what_was_looked_for(name: str) -> None:
    model = replaced(family("llama"), Clipped)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50.0)
    with pytest.raises(ApproximationError) as caught, approximate(model, name, calibration_rows=CALIBRATION):
        pass
    text = str(caught.value)
    assert "Clipped" in text and "not linear" in text and "looked for a floating weight" in text and "a8" in text
    with approximate(model, "a8"):
        assert torch.isfinite(model(input_ids=IDS).logits).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_unpacked(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs trimtab[quantised]")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made = worlds.aligned(64).model  # it packs blocks of 64
    made.save_pretrained(tmp_path)
    how = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**how)).eval()
    layers, exact = find_sites(shipped), find_sites(made)
    for site in ("attn_in", "up"):
        own, meant = quantization.site_weights(layers[0], site), quantization.site_weights(exact[0], site)
        for weight, wanted in zip(own, meant, strict=True):
            assert weight.shape == wanted.shape
            share = float((weight.float() - wanted).abs().max() / wanted.abs().max())
            assert 0.0 < share < (0.18 if bits == 4 else 0.02)  # FP4: half of its widest gap is 1/6 of the largest
        packed, plain = (quantization.weight_maxima(one[0], site) for one in (layers, exact))
        assert float((packed / plain - 1.0).abs().max()) < 0.25  # four bits move a largest value that much
    ids = torch.tensor([[2, 5, 6, 7, 8, 9]])
    with torch.inference_mode():
        before = shipped(input_ids=ids).logits
    for name in ("smoothquant:8", "omniquant:8,steps=2"):
        with approximate(shipped, name, calibration_rows=[[2, 5, 6, 7, 8, 9]] * 3), torch.inference_mode():
            changed = shipped(input_ids=ids).logits
        gap = float((changed - before).float().norm() / before.float().norm())
        assert 0.0 < gap < 0.1, (name, gap)
    with torch.inference_mode():
        assert torch.equal(shipped(input_ids=ids).logits, before)


def test_four_bits_of_compressed_tensors_are_unpacked(tmp_path: Path) -> None:
    quantised = pytest.importorskip("compressed_tensors.quantization", reason="needs trimtab[quantised]")
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    model = tiny_model(tied=False).model
    exact = copy.deepcopy(model)
    weights = quantised.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=16)
    scheme = quantised.QuantizationScheme(targets=["Linear"], weights=weights)
    settings = quantised.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    quantised.apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.reshape(module.weight.shape[0], -1, 16)
            module.weight_scale.data = groups.abs().amax(-1) / 7.5
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    layers = find_sites(shipped)
    for weight, wanted in zip(
        quantization.site_weights(layers[0], "up"), quantization.site_weights(find_sites(exact)[0], "up"), strict=True
    ):
        assert weight.shape == wanted.shape
        assert 0.0 < float((weight.float() - wanted).norm() / wanted.norm()) < 0.2
    with approximate(shipped, "omniquant:8,steps=1", calibration_rows=[[2, 5, 6, 7]]), torch.no_grad():
        assert torch.isfinite(shipped(input_ids=torch.tensor([[2, 5, 6]])).logits).all()


def test_stacked_experts_that_are_packed_are_refused() -> None:
    layer = find_sites(family("mixtral"))[0]
    layer.mlp.gate_up_proj = nn.Parameter(layer.mlp.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ApproximationError, match=r"(?s)MixtralExperts.*float8_e4m3fn"):
        quantization.site_weights(layer, "up")
