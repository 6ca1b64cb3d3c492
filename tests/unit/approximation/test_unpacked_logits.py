"""Approximations of weight-quantised checkpoints against logits computed by hand from their unpacked weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.tiny import tiny_tokenizer
from tests.unit.patching import worlds
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trimtab import approximate
from trimtab.four_bits import keep_order

IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 11]])


def rounded(x: Tensor, bits: int) -> Tensor:
    """Per token, symmetric: by NumPy."""
    values = x.detach().numpy()
    step = np.maximum(np.abs(values).max(-1, keepdims=True), 1e-5) / (2 ** (bits - 1) - 1)
    return torch.from_numpy((np.round(values / step) * step).astype(values.dtype)).to(x.dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.float()
    return found


def by_hand(model: Any, bits: int) -> Tensor:
    """Logits of a plain model in whose layers every linear map reads rounded inputs."""
    handles = [
        module.register_forward_pre_hook(lambda _, args: rounded(args[0], bits))
        for module in model.model.layers.modules()
        if isinstance(module, nn.Linear)
    ]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def compare(shipped: Any, plain: Any, bits: int, tolerance: float) -> None:
    """Approximated, a checkpoint gives what its weights give on rounded inputs; exact, what they give."""
    exact, wanted = logits(plain), by_hand(plain, bits)
    torch.testing.assert_close(logits(shipped), exact, rtol=0, atol=tolerance)
    with approximate(shipped, f"a{bits}"):
        seen = logits(shipped)
    moved = float((wanted - exact).abs().max())
    assert moved > 10 * tolerance
    torch.testing.assert_close(seen, wanted, rtol=0, atol=tolerance)


def test_four_bits_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs trimtab[quantised]")
    from transformers import BitsAndBytesConfig

    made = worlds.aligned(64).model  # it packs blocks of 64
    made.save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how).eval()
    keep_order(shipped)  # repacked, it multiplies in bfloat16
    plain = copy.deepcopy(made).eval()
    with torch.no_grad():
        for layer in plain.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    packed, state = functional.quantize_4bit(module.weight.data, quant_type="nf4")
                    module.weight.copy_(functional.dequantize_4bit(packed, state, quant_type="nf4"))
    assert float((logits(plain) - logits(made)).abs().max()) > 1e-3
    compare(shipped, plain, 4, 1e-4)


def write_gguf(model: Any, path: Path) -> None:
    """A Llama model in eight bits (Q8_0), queries and keys in the order that GGUF keeps them in."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tiny_tokenizer().get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}  # fmt: skip
    for key, value in model.state_dict().items():
        part = key.removesuffix(".weight").removeprefix("model.")
        block = ""
        if part.startswith("layers."):
            _, index, part = part.split(".", 2)
            block = f"blk.{index}."
        weight = value.numpy()
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{block}{names[part]}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_eight_bits(weight: Tensor) -> Tensor:
    """Q8_0: blocks of 32 along a row, a scale in half precision each."""
    blocks = weight.numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    levels = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return torch.from_numpy((levels * scale.astype(np.float16).astype(np.float32)).reshape(tuple(weight.shape)))


def test_eight_bits_of_a_gguf_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3.0)
    write_gguf(made, tmp_path / "tiny.gguf")
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    plain = copy.deepcopy(made)
    with torch.no_grad():
        for weight in plain.parameters():
            if weight.dim() == 2:
                weight.copy_(in_eight_bits(weight.detach()))
    assert float((logits(plain) - logits(made)).abs().max()) > 1e-3
    compare(shipped, plain, 4, 1e-4)
