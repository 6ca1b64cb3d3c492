"""Keys and values at 8 and 4 bits are those of a cache that stores rounded ones, rounded here by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor
from transformers import DynamicCache

from trimtab import approximate

IDS = torch.tensor(token_rows(3, 12))


def by_hand(x: Tensor, bits: int) -> Tensor:
    """Each token and head (last dimension) to 2^bits levels from its least to its largest value, in float32."""
    values = x.float().numpy()
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    step = np.maximum(high - low, np.float32(1e-5)) / np.float32(2**bits - 1)
    zero = np.round(-low / step)
    levels = np.clip(np.round(values / step) + zero, 0, 2**bits - 1)
    return torch.from_numpy((levels - zero) * step).to(x.dtype)


class RoundedHere(DynamicCache):
    """Stores what it is given rounded."""

    bits = 8

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = by_hand(key_states, self.bits), by_hand(value_states, self.bits)
        return super().update(*rounded, *args, **kwargs)


def read_and_decode(model: Any, cache: DynamicCache) -> list[Tensor]:
    """Logits of a prompt of eight tokens, then of four more read one by one."""
    with torch.no_grad():
        found = [model(input_ids=IDS[:, :8], cache=cache, use_cache=True).logits]
        for place in range(8, 12):
            found.append(model(input_ids=IDS[:, place : place + 1], cache=cache, use_cache=True).logits)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_rounded_cache_gives_the_same_logits(name: str, bits: int, attention: str, dtype: torch.dtype) -> None:
    model = family(name).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(20.0)  # random weights attend evenly, whatever the keys
            layer.self_attn.v_proj.weight.mul_(20.0)
    model.set_attn_implementation(attention)
    stored = RoundedHere(config=model.config)
    stored.bits = bits
    wanted, exact = read_and_decode(model, stored), read_and_decode(model, DynamicCache(config=model.config))
    with approximate(model, f"kv{bits}"):
        seen = read_and_decode(model, DynamicCache(config=model.config))
    for one, other, free in zip(seen, wanted, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
        moved = float((one - free).float().abs().mean())
        assert float((one - other).float().abs().mean()) < 0.02 * moved
        assert moved > 0.0
