"""Reading a shared prefix once gives the logits, gradients and texts of reading whole rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_model
from transformers import Gemma2Config, MistralConfig
from transformers.models.gemma2 import Gemma2ForCausalLM
from transformers.models.mistral import MistralForCausalLM

from trimtab import generation, prefix

ROWS = [[2, 5, 6, 7, 8, 9, 10, 11], [2, 5, 6, 7, 8, 9, 12], [2, 5, 6, 7, 8, 9, 13, 14, 15, 16]]


def test_logits_and_gradients_equal_those_of_whole_rows() -> None:
    model = tiny_model().model
    shared = prefix.shared_length(ROWS)
    assert shared == 6
    outputs = []
    for length in (shared, 0):
        logits = prefix.read(model, prefix.collate(ROWS, 0, length), logits_to_keep=1).logits
        outputs.append((logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(outputs[0][1], outputs[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_unpadded_rows_one_by_one_agree() -> None:
    model = tiny_model().model
    together = prefix.read(model, prefix.collate(ROWS, 0, 6), logits_to_keep=1).logits[:, -1]
    for row, logits in zip(ROWS, together, strict=True):
        torch.testing.assert_close(model(input_ids=torch.tensor([row])).logits[0, -1], logits, atol=1e-6, rtol=1e-5)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6))
def test_shared_length_is_shared_and_leaves_a_token_of_its_own(rows: list[list[int]]) -> None:
    length = prefix.shared_length(rows)
    assert all(row[:length] == rows[0][:length] and len(row) > length for row in rows)
    assert length == 0 or length >= prefix.LEAST_TOKENS


def test_generation_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model()
    chats = [[{"role": "system", "content": "route this message please"}, {"role": "user", "content": w}]
             for w in ("bake a cake", "weather today nice", "steal the second base")]  # fmt: skip
    settings = generation.GenerationSettings(max_new_tokens=8, batch_size=3)
    with_prefix = generation.generate(loaded, chats, settings)
    monkeypatch.setattr(prefix, "supports", lambda model: False)
    assert generation.generate(loaded, chats, settings) == with_prefix


def test_sliding_windows_are_read_whole() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    assert not prefix.supports(Gemma2ForCausalLM(Gemma2Config(**small)))
    assert not prefix.supports(MistralForCausalLM(MistralConfig(**small, sliding_window=8)))
    assert prefix.supports(MistralForCausalLM(MistralConfig(**small, sliding_window=None)))
