"""Continuous batching gives what the model's own ``generate`` gives, whatever comes and goes beside a row."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trimtab import decoding, generation, prefix, slots
from trimtab.approximation import approximate
from trimtab.decoding import Limits, choose
from trimtab.generation import GenerationSettings, Prompt, generate_ids
from trimtab.models import LoadedModel

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
         "eos_token_id": [3, 9], "bos_token_id": 2, "initializer_range": 0.4}  # fmt: skip
FAMILIES = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
}


class Tokenizer:
    """Only what decoding asks of one."""

    pad_token_id, eos_token_id = 0, 3


def prompts(count: int, seed: int = 0, begin: tuple[int, ...] = (2, 5, 6, 7, 8)) -> list[list[int]]:
    draw = random.Random(seed)
    return [[*begin, *(draw.randrange(10, 30) for _ in range(draw.randrange(1, 12)))] for _ in range(count)]


def decoded(model: Any, asked: list[list[int]], limits: Limits, wave: int = 10**6) -> dict[int, tuple[list[int], bool]]:
    """Answers by place; ``wave``: so many prompts wait at a time, the next come while those are answered."""
    waiting = deque(Prompt(place, ids) for place, ids in enumerate(asked))
    found: dict[int, tuple[list[int], bool]] = {}

    def take(count: int) -> list[Prompt]:
        return [waiting.popleft() for _ in range(min(count, wave, len(waiting)))]

    def done(prompt: Prompt, new: list[int], cut: bool) -> None:
        assert prompt.key not in found
        found[prompt.key] = (new, cut)

    decoding.decode(model, Tokenizer(), take, done, limits)
    assert sorted(found) == list(range(len(asked)))
    return found


def one_by_one(model: Any, asked: list[list[int]], tokens: int) -> dict[int, tuple[list[int], bool]]:
    """The oracle: Transformers' greedy generate, one unpadded row at a time."""
    found = {}
    for place, ids in enumerate(asked):
        row = torch.tensor([ids])
        out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False)
        new = out[0, len(ids) :].tolist()
        end = next((n for n, token in enumerate(new) if token in (0, 3, 9)), None)
        found[place] = (new if end is None else new[:end], end is None)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "wave"), [(1, 1), (4, 2), (8, 8), (64, 64), (5, 3)])
def test_rows_that_come_and_go_get_their_own_answers(family: str, rows: int, wave: int) -> None:
    torch.manual_seed(4)
    model = FAMILIES[family]().eval()
    assert decoding.supports(model)
    asked = prompts(40)
    expected = one_by_one(model, asked, 24)
    assert len({len(new) for new, _ in expected.values()}) > 3  # answers of many lengths, or nothing is tested
    assert {cut for _, cut in expected.values()} == {True, False}
    assert decoded(model, asked, Limits(rows, 24), wave) == expected


def test_prompts_without_a_common_beginning_and_longer_than_all_before() -> None:
    torch.manual_seed(4)
    model = FAMILIES["qwen2"]().eval()
    asked = [*prompts(6, 1), *prompts(6, 2, (4,)), [*range(10, 60)], *prompts(6, 3, (2, 5, 6, 7, 11))]
    assert decoded(model, asked, Limits(4, 16), 3) == one_by_one(model, asked, 16)


def test_columns_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model = FAMILIES["qwen2"]().eval()
    widths: list[int] = []
    step = slots.Slots.step

    def watched(self: slots.Slots, *arguments: Any) -> Any:
        widths.append(self.mask.shape[1])
        return step(self, *arguments)

    monkeypatch.setattr(slots.Slots, "step", watched)
    decoded(model, prompts(200), Limits(8, 24))
    assert len(widths) > 150 and max(widths) < 100  # 16 + 24 columns are the longest row


def test_fewer_passes_than_whole_batches_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum of rows over all steps: whole batches pay for the longest of each, this pays for the tokens."""
    torch.manual_seed(4)
    model = FAMILIES["qwen2"]().eval()
    asked = prompts(64)
    lengths = [len(new) + (not cut) for new, cut in one_by_one(model, asked, 24).values()]
    computed = 0
    step = slots.Slots.step

    def counted(self: slots.Slots, *arguments: Any) -> Any:
        nonlocal computed
        computed += self.count
        return step(self, *arguments)

    monkeypatch.setattr(slots.Slots, "step", counted)
    decoded(model, asked, Limits(16, 24))
    whole = sum(16 * (max(lengths[first : first + 16]) - 1) for first in range(0, 64, 16))
    needed = sum(lengths) - 64  # the first token comes from reading the prompt
    assert needed <= computed <= 1.25 * needed
    assert computed < 0.9 * whole


def test_sampled_answers_do_not_depend_on_their_company() -> None:
    torch.manual_seed(4)
    model = FAMILIES["qwen2"]().double().eval()
    asked = prompts(20)
    hot = Limits(1, 12, temperature=1.5, top_p=0.9, seed=7)
    alone = decoded(model, asked, hot)
    assert decoded(model, asked, hot._replace(rows=16), 5) == alone
    assert decoded(model, asked, hot._replace(seed=8)) != alone
    twice = decoded(model, [asked[0], asked[0]], hot)
    assert twice[0] == alone[0] and twice[1] != alone[0]  # the second time is another draw


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    """Against NumPy: 20,000 draws from five tokens of which top-p 0.8 keeps three."""
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.06, 0.3, 0.14]]))
    randoms = [torch.Generator().manual_seed(0)]
    limits = Limits(1, 1, temperature=1.0, top_p=0.8)
    drawn = np.bincount([choose(logits, randoms, limits)[0] for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(drawn, np.array([0, 0.4, 0, 0.3, 0.14]) / 0.84, atol=0.012)
    cooler = limits._replace(temperature=0.5, top_p=1.0)
    squares = np.array([0.1, 0.4, 0.06, 0.3, 0.14]) ** 2
    drawn = np.bincount([choose(logits, randoms, cooler)[0] for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(drawn, squares / squares.sum(), atol=0.012)


def test_what_is_not_supported_goes_through_the_models_own_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decoding.supports(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)))
    gemma = {key: value for key, value in SMALL.items() if key != "eos_token_id"}
    assert not decoding.supports(Gemma2ForCausalLM(Gemma2Config(**gemma, head_dim=8)))
    loaded = tiny_model()
    asked = [[2, 5, 6, 7], [2, 5, 8, 9, 10]]
    settings = GenerationSettings(max_new_tokens=8)
    ours = generate_ids(loaded, asked, settings)
    loaded.model.generation_config.repetition_penalty = 1.0001  # a processor: Transformers has to do it
    assert not decoding.supports(loaded.model)
    monkeypatch.setattr(decoding, "decode", None)
    assert generate_ids(loaded, asked, settings) == ours


@pytest.mark.parametrize("name", ["teal:0.3", "a8", "kv8", "noise:up=0.05,down=0.05", "bolt+a8"])
def test_approximated_models_answer_as_their_own_generate_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TEAL treats prompt and reply differently, noise goes by positions: both must see the same rows either way."""
    loaded = tiny_model(seed=3)
    asked = prompts(12)
    settings = GenerationSettings(max_new_tokens=10, batch_size=4)
    with approximate(loaded, name):
        assert decoding.supports(loaded.model)
        together = generate_ids(loaded, asked, settings)
        monkeypatch.setattr(decoding, "supports", lambda model: False)
        own = [generate_ids(loaded, [ids], settings)[0] for ids in asked]
    assert together == own
    assert len({answer.text for answer in own}) > 1


def test_batches_are_sized_by_memory_and_never_fail_for_want_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model()  # 2 x 2 layers x 2 heads x 8 x 4 bytes = 256 a token, 262,144 for 1,024
    monkeypatch.setattr(generation, "_free_memory", lambda device: 10 * 4 * 262_144)
    assert generation.fitting_rows(loaded) == 10
    monkeypatch.setattr(generation, "_free_memory", lambda device: 1)
    assert generation.fitting_rows(loaded) == 1
    monkeypatch.setattr(generation, "_free_memory", lambda device: 10**15)
    assert generation.fitting_rows(loaded) == generation.MOST_ROWS
    bare = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))  # recurrent: no attention heads
    assert generation.fitting_rows(LoadedModel(model=bare, tokenizer=None, name="x")) == generation.USUAL_ROWS  # type: ignore[arg-type]


def test_the_remembered_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model = FAMILIES["qwen2"]().eval()
    lengths: list[int] = []
    monkeypatch.setattr(
        prefix, "shared_length", lambda rows, real=prefix.shared_length: lengths.append(1) or real(rows)
    )
    decoded(model, prompts(40), Limits(8, 8))
    assert len(lengths) == 1
