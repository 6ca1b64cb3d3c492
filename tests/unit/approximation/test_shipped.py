"""What is measured is what people ship: rounding and checkpoints of compressed-tensors, llm-compressor's format."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from tests.unit.patching import worlds

from trimtab import models
from trimtab.approximation import approximate
from trimtab.approximation.quantization import round_asymmetric, round_symmetric
from trimtab.errors import ModelError
from trimtab.models import LoadedModel

IDS = torch.tensor([[2, 5, 6, 7, 8, 9]])


@pytest.fixture
def quantization() -> Any:
    return pytest.importorskip("compressed_tensors.quantization", reason="needs trimtab[quantised]")


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_is_rounded_as_the_library_rounds_it_bit_for_bit(quantization: Any, bits: int, symmetric: bool) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 9, 96, generator=draw) * torch.rand(96, generator=draw) * 5
    how = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, how, None)
    ours = round_symmetric(x, bits, "full") if symmetric else round_asymmetric(x, bits)
    assert torch.equal(ours, fake_quantize(x, scale, zero, how))


def saved_in_8_bits(quantization: Any, folder: Path) -> LoadedModel:
    """Write a checkpoint with weights and activations in 8 bits; the same model with only its weights rounded."""
    from compressed_tensors.compressors import ModelCompressor

    shipped, plain = tiny_model(), tiny_model()
    with torch.no_grad():
        for weight in (one for loaded in (shipped, plain) for one in loaded.model.parameters() if one.dim() == 2):
            weight.mul_(4.0)  # random weights are too small for rounding to matter
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
        input_activations=quantization.QuantizationArgs(
            num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
        ),
    )
    settings = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="int-quantized"
    )
    quantization.apply_quantization_config(shipped.model, settings)
    for name, module in shipped.model.named_modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127.5
            weight = plain.model.get_submodule(name).weight
            weight.data = round_symmetric(weight.data, 8, "full")
    compressor = ModelCompressor.from_pretrained_model(shipped.model)
    compressor.compress_model(shipped.model)
    shipped.model.save_pretrained(folder)
    compressor.update_config(folder)
    shipped.tokenizer.save_pretrained(folder)
    return plain


def test_a_checkpoint_in_8_bits_is_vetted_as_a_model_and_is_what_the_approximation_says(
    quantization: Any, tmp_path: Path
) -> None:
    plain = saved_in_8_bits(quantization, tmp_path / "shipped")
    shipped = models.load(str(tmp_path / "shipped"))
    with torch.inference_mode():
        expected = shipped.model(input_ids=IDS).logits
        weights_only = plain.model(input_ids=IDS).logits
        with approximate(plain.model, "a8:grid=full"):
            ours = plain.model(input_ids=IDS).logits
    assert float((weights_only - expected).abs().max()) > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_it_can_be_approximated_further_and_leaves_no_trace(quantization: Any, tmp_path: Path) -> None:
    saved_in_8_bits(quantization, tmp_path / "shipped")
    shipped = models.load(str(tmp_path / "shipped"))
    with torch.inference_mode():
        before = shipped.model(input_ids=IDS).logits
        with approximate(shipped.model, "teal:0.5,prefill=1", calibration_rows=[[2, 5, 6, 7]]):
            sparse = shipped.model(input_ids=IDS).logits
        after = shipped.model(input_ids=IDS).logits
    assert float((sparse - before).abs().max()) > 1e-2
    assert torch.equal(before, after)


def test_a_checkpoint_of_bitsandbytes_is_vetted_as_a_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs trimtab[quantised]")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made, exact, packed = worlds.aligned(64), tmp_path / "exact", tmp_path / "packed"  # it packs blocks of 64
    for folder in (exact, packed):
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(exact, quantization_config=settings).save_pretrained(packed)
    assert (packed / "model.safetensors").stat().st_size < (exact / "model.safetensors").stat().st_size
    shipped = models.load(str(packed))
    with torch.inference_mode():
        four, full = (one.model(input_ids=IDS).logits for one in (shipped, models.load(str(exact))))
        with approximate(shipped.model, "teal:0.5,prefill=1", calibration_rows=[[2, 5, 6, 7]]):
            sparse = shipped.model(input_ids=IDS).logits
        after = shipped.model(input_ids=IDS).logits
    assert 1e-4 < float((four - full).abs().max()) < float(full.abs().max())
    assert float((sparse - four).abs().max()) > 1e-3
    assert torch.equal(four, after)


@pytest.mark.parametrize(
    ("settings", "package", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
            "optimum",
            "cannot be loaded here.*optimum",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            "gptqmodel",
            "cannot be loaded here.*gptqmodel",
        ),
        ({"quant_method": "abacus", "bits": 4}, "", "does not read.*abacus.*compressed-tensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_here_says_why(
    settings: dict[str, Any], package: str, message: str, tmp_path: Path
) -> None:
    if package and find_spec(package):
        pytest.skip(f"{package} is installed, so it can be read")
    loaded = tiny_model()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=f"(?s){message}"):
        models.load(str(tmp_path))
