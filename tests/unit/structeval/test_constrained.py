"""Constrained decoding on a random tiny model, whose free answers are never JSON."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import TEMPLATE, tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import models
from trimtab.errors import UsageError
from trimtab.models import LoadedModel
from trimtab.structeval import constrained, generations, grammars, tasks
from trimtab.structeval.generate import Settings, generate, run_key


def json_task(number: int, output: str = "JSON") -> tasks.Task:
    row = {"task_id": f"0005{number:02}", "query": f"Give {'x ' * number}", "task_name": f"Text to {output}",
           "input_type": "Text", "output_type": output, "raw_output_metric": ["a"], "VQA": []}  # fmt: skip
    return tasks.task_from_row(row, "")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("llguidance") is None:
        pytest.skip(f"llguidance is not installed: {constrained.INSTALL}")
    loaded = byte_model()
    monkeypatch.setattr(models, "load", lambda name: loaded)
    return loaded


def byte_model() -> LoadedModel:
    """As ``tests.tiny``, but it can write any byte."""
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({text: index for index, text in enumerate(["<pad>", "<s>", "</s>", *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return LoadedModel(model=model, tokenizer=tokenizer, name="bytes")


def is_prefix_of_json(text: str) -> bool:
    """An independent check: the text parses, or the parser failed for lack of more text only."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except json.JSONDecodeError as error:
        return text[:1] in "{[" and (error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg)


def test_every_answer_is_json_or_the_beginning_of_it(tiny: Any, tmp_path: Path) -> None:
    chosen = [json_task(n) for n in range(6)]
    free = generate("tiny", chosen, tmp_path / "free.jsonl", Settings(40, batch_size=3))
    held = generate("tiny", chosen, tmp_path / "held.jsonl", Settings(40, batch_size=3, constrain=True))
    assert free.done == held.done == 6
    before = [one.generation or "" for one in generations.read(tmp_path / "free.jsonl")]
    after = [one.generation or "" for one in generations.read(tmp_path / "held.jsonl")]
    assert not any(map(is_prefix_of_json, before))
    assert all(map(is_prefix_of_json, after)), after
    assert all(after)


def test_a_row_that_is_over_does_not_disturb_the_others(tiny: Any) -> None:
    processor = constrained.Held(tiny, [grammars.grammar("json", "")] * 2)
    vocabulary = tiny.model.get_output_embeddings().weight.shape[0]
    token = tiny.tokenizer.get_vocab()
    opened, closed = token["{"], token["}"]
    ids = torch.tensor([[1, 2], [1, 2]])
    scores = processor(ids, torch.zeros(2, vocabulary))
    assert scores[0, opened] == 0 and scores[0, closed] == -torch.inf
    written = [1, 2, opened]
    for letter in '"":1':
        written.append(token[letter] if letter != ":" else token[":"])
        scores = processor(torch.tensor([written, written]), torch.zeros(2, vocabulary))
        if letter == ":":
            written.append(token["\u0120"])  # a space, as byte-level tokenizers write it
            processor(torch.tensor([written, written]), torch.zeros(2, vocabulary))
    assert scores[0, closed] == 0
    end = tiny.model.generation_config.eos_token_id
    for last in (closed, end):
        written.append(last)
        scores = processor(torch.tensor([written, written]), torch.zeros(2, vocabulary))
    assert torch.isfinite(scores).all()


def test_a_vocabulary_that_cannot_write_json_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="cannot be constrained"):
        constrained.Held(tiny_model(), [grammars.grammar("json", "")])


def test_other_formats_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no grammar for a format"):
        generate("tiny", [json_task(1), json_task(2, "SVG")], tmp_path / "a.jsonl", Settings(constrain=True))
    with pytest.raises(UsageError, match="a server constrains JSON only"):
        generate("vllm/x", [json_task(2, "YAML")], tmp_path / "a.jsonl", Settings(constrain=True))


def test_without_llguidance_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="structeval-constrained"):
        generate("tiny", [json_task(1)], tmp_path / "a.jsonl", Settings(constrain=True))


def test_a_server_gets_the_schema() -> None:
    assert constrained.response_schema().json_schema.type == "object"


def test_files_of_free_answers_keep_their_key() -> None:
    assert "constrain" not in run_key("m", Settings()) and run_key("m", Settings(constrain=True))["constrain"] is True
    assert run_key("m", Settings())["key"] != run_key("m", Settings(constrain=True))["key"]
