"""Approximations on the real small model."""

from __future__ import annotations

import pytest
import torch

from trimtab import approximate, load
from trimtab.approximation.apply import active_label
from trimtab.generation import GenerationSettings, generate

pytestmark = pytest.mark.integration


def test_the_demo_model_under_approximations_and_after() -> None:
    loaded = load("demo")
    ids = torch.tensor([loaded.tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]])
    chats = [[{"role": "user", "content": text}] for text in ("What is bread made of?", "Name a colour.")]
    settings = GenerationSettings(max_new_tokens=6)
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
    changes = {}
    for name in ("a8", "bolt+kv8", "noise:up=0.05"):
        with approximate(loaded, name), torch.no_grad():
            changes[name] = float((loaded.model(input_ids=ids).logits - before).abs().mean())
            assert all(answer.text for answer in generate(loaded, chats, settings))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    assert all(0.0 < change < float("inf") for change in changes.values())


def test_a_name_carries_its_approximation() -> None:
    loaded = load("demo?approx=a8:layers=0-1")
    assert active_label(loaded.model) == "a8:layers=0-1"
