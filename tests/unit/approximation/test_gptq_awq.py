"""Checkpoints in the layouts of GPTQ and AWQ are vetted as models; runs where GPTQModel and Optimum are installed.

The weights are rounded and packed here, four bits, eight to an integer, so that what they stand for is known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import models
from trimtab.approximation import approximate

IDS = torch.tensor([[2, 5, 6, 7, 8, 9]])
GROUP = 128
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's, of columns in an integer
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
}


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Eight tensors of four bits in one of 32, the first in the lowest bits."""
    total = sum(part.to(torch.int64) << (4 * place) for place, part in enumerate(parts))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def packed(weight: torch.Tensor, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A linear map's tensors as the method stores them, and the weight (out x in) that they stand for."""
    out, width = weight.shape
    groups = weight.reshape(out, width // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 7).half().float()  # out x groups
    levels = (torch.round(groups / scale[..., None]).clamp(-8, 7) + 8).to(torch.int64)
    meant = ((levels - 8) * scale[..., None]).reshape(out, width)
    stored = levels.reshape(out, width).T  # in x out
    scales = scale.T.half()
    if method == "gptq":
        zeros = joined([torch.full((out // 8, width // GROUP), 7)] * 8)  # stored minus one
        rows = joined([stored[place::8] for place in range(8)])
        index = (torch.arange(width) // GROUP).to(torch.int32)
        return {"qweight": rows, "qzeros": zeros.T, "scales": scales, "g_idx": index}, meant
    columns = joined([stored[:, place::8] for place in ORDER])
    zeros = joined([torch.full((width // GROUP, out // 8), 8)] * 8)
    return {"qweight": columns, "qzeros": zeros, "scales": scales}, meant


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_a_packed_checkpoint_gives_the_logits_that_its_weights_stand_for(method: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="needs gptqmodel and optimum, which ask for another PyTorch than CI's")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    meant = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in meant.parameters():
            weight.mul_(3.0)
    exact = meant(input_ids=IDS).logits.detach()
    meant.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        parts, meant.get_parameter(name).data = packed(weight, method)
        stored |= {name.removesuffix("weight") + key: part.contiguous() for key, part in parts.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": SETTINGS[method]}))

    shipped = models.load(str(tmp_path)).model
    with torch.inference_mode():
        seen, expected = shipped(input_ids=IDS).logits.float(), meant(input_ids=IDS).logits
        with approximate(shipped, "a4"):
            rounded = shipped(input_ids=IDS).logits.float()
        after = shipped(input_ids=IDS).logits.float()
    assert float((exact - expected).abs().max()) > 0.2
    torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)  # its kernels compute in half precision
    assert float((rounded - seen).abs().max()) > 0.01
    assert torch.equal(seen, after)
