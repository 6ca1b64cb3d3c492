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
    for name in ("bolt+kv8", "noise:up=0.005", "a8", "noise:up=0.05"):
        with approximate(loaded, name), torch.no_grad():
            changes[name] = float((loaded.model(input_ids=ids).logits - before).abs().mean())
            assert all(answer.text for answer in generate(loaded, chats, settings))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    # The logits' standard deviation is 7. The up projection's inputs have a root mean square of 0.1 to 0.4, so that
    # noise of 0.005 is a few per cent of them and noise of 0.05 a third.
    assert 0.0 < changes["bolt+kv8"] < 0.5
    assert 0.05 < changes["noise:up=0.005"] < 2.0
    assert 0.3 < changes["a8"] < 3.0
    assert 4.0 < changes["noise:up=0.05"] < 15.0


def test_a_name_carries_its_approximation() -> None:
    loaded = load("demo?approx=a8:layers=0-1")
    assert active_label(loaded.model) == "a8:layers=0-1"
