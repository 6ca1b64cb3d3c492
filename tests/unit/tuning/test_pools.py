"""Anchors as token ids: the template alone renders them, and a padded row has the loss that it has alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AddedToken

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning.pools import build_pools, reader_for, tokenise, turn_end


def _anchors() -> SafetyAnchors:
    return SafetyAnchors(
        (
            Anchor("make a bomb", "refuse", "sorry i can't help with that"),
            Anchor("how to steal the second base please", "refuse", "i can't help"),
            Anchor("bake a cake", "answer", "sure here is how"),
        ),
        origin="test",
    )


def test_rendered_ids_are_the_template_s_own(tiny: LoadedModel) -> None:
    row = tokenise(tiny, _anchors().anchors[0], None, None)
    chat = [{"role": "user", "content": "make a bomb"}]
    text = tiny.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert row.prompt == tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.reply[-1] == tiny.tokenizer.eos_token_id  # the end of turn is supervised
    assert len(tokenise(tiny, _anchors().anchors[0], None, 3).reply) == 3


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<end_of_turn>\n", "<end_of_turn>"),
        (" <|end|>\n</s>", "<|end|>"),
        (" </s> ", "</s>"),
        ("", "</s>"),
        ("\n", "</s>"),
        (" user:", "</s>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_turn_is_the_template_s_own(tiny: LoadedModel, after: str, end: str, special: bool) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_tokens([AddedToken(name, special=special) for name in ("<end_of_turn>", "<|end|>")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    other = replace(tiny, tokenizer=tokenizer)
    wanted = tokenizer.convert_tokens_to_ids(end)
    assert turn_end(other) == wanted
    assert tokenise(other, _anchors().anchors[0], None, None).reply[-1] == wanted


def test_an_anchor_without_supervised_tokens_raises(tiny: LoadedModel) -> None:
    with pytest.raises(GuardError, match="no supervised token"):
        tokenise(tiny, Anchor("make a bomb", "refuse", ""), None, 3)
    with pytest.raises(GuardError, match="no reply yet"):
        tokenise(tiny, Anchor("make a bomb", "refuse"), None, 3)


@pytest.mark.parametrize("decision_tokens", [None, 2])
def test_losses_equal_an_unpadded_reference(tiny: LoadedModel, decision_tokens: int | None) -> None:
    pool = build_pools(tiny, _anchors(), decision_tokens)["refuse"]
    together = reader_for(tiny, tiny.model).measure(pool.rows)
    for value, row in zip(together, pool.rows, strict=True):
        ids = torch.tensor([row.prompt + row.reply])
        logits = tiny.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        torch.testing.assert_close(value, F.cross_entropy(logits, torch.tensor(row.reply)), atol=1e-5, rtol=1e-5)


def test_rotation_visits_every_anchor_and_continues(tiny: LoadedModel) -> None:
    anchors = SafetyAnchors(
        tuple(Anchor(f"make a {w}", "refuse", "sorry") for w in ("bomb", "cake", "base", "message", "day")), "t"
    )
    pool = build_pools(tiny, anchors, 1)["refuse"]
    assert [pool.next_indices(2) for _ in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert pool.next_indices(99) == [1, 2, 3, 4, 0]
