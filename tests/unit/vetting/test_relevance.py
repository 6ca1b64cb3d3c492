"""Relevance against a closed form, and on answers whose questions are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import TEMPLATE, tiny_model
from transformers import LlamaConfig

from trimtab.models import LoadedModel
from trimtab.vetting.own_words import LEAST_TOKENS, OwnWords, own_words, reply_nats
from trimtab.vetting.relevance import Relevance, relevance
from trimtab.vetting.scrutiny import scrutinise, sound

WORDS = 40


class _Echo:
    """A token that occurred before has probability 0.9 shared with its like; all others share the rest."""

    device = torch.device("cpu")

    config = LlamaConfig(sliding_window=8)  # so that rows are read whole

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: object) -> SimpleNamespace:
        seen = torch.nn.functional.one_hot(input_ids, WORDS).cumsum(1) > 0  # rows x width x words
        told = seen.sum(-1, keepdim=True)
        logits = torch.where(seen, 0.9 / told, 0.1 / (WORDS - told)).log()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


class _Tokenizer:
    chat_template, pad_token_id, eos_token_id = TEMPLATE, 0, 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def apply_chat_template(self, messages: Any, **_: object) -> str:
        return str(messages[-1]["content"])


@pytest.fixture
def echo() -> LoadedModel:
    return LoadedModel(model=_Echo(), tokenizer=_Tokenizer(), name="echo")  # type: ignore[arg-type]


ASKED = ["2 3 4 5", "6 7 8 9", "10 11 12 13"]


def test_the_gain_is_that_of_the_closed_form(echo: LoadedModel) -> None:
    (found,) = relevance(echo, ASKED[:1], ["2 3 4 5 2 3"], ASKED[:2], 6)
    own = -math.log(0.9 / 4)  # all six tokens were seen, four words are known
    foreign = 0.0
    for said in range(6):
        known = 4 + min(said, 4)  # the other question's words, and the answer's so far
        foreign -= math.log(0.9 / known) if said >= 4 else math.log(0.1 / (WORDS - known))
    assert found == pytest.approx(foreign / 6 - own, rel=1e-5)


def test_answers_about_something_else_are_off_topic_and_short_ones_never(echo: LoadedModel) -> None:
    judge = Relevance(echo, 6, limit=0.2)
    answers = ["2 3 4 5 4 3", "2 3 4 5 4 3", "10 11"]
    assert judge.off_topic(ASKED, answers, ASKED) == [False, True, False]
    assert judge.off_topic(ASKED[:1], ["30 31 32 33 34 35"], ASKED[:1]) == [False]  # no other question, nothing told


def test_the_limit_separates_own_answers_from_swapped_ones(echo: LoadedModel) -> None:
    asked = [" ".join(str(2 + (4 * place + n) % 36) for n in range(4)) for place in range(9)]
    said = [f"{text} {text[:5].strip()}" for text in asked]
    judge = Relevance(echo, 6, OwnWords(asked, said))
    assert not any(judge.off_topic(asked, said, asked))
    own, foreign = (relevance(echo, asked, told, asked, 6) for told in (said, [*said[4:], *said[:4]]))
    assert min(value or 0.0 for value in own) > judge.limit + 0.5
    assert max(value or 0.0 for value in foreign) < judge.limit + 1e-6  # equal to it, but for rounding


def test_replies_are_read_as_transformers_reads_them() -> None:
    loaded = tiny_model()
    rows = [([2, 5, 6, 7], [8, 9]), ([2, 5, 6], [9, 4, 11]), ([2, 5, 6, 10, 12], [7])]
    for (prompt, reply), found in zip(rows, reply_nats(loaded, rows), strict=True):
        labels = torch.tensor([[-100] * len(prompt) + reply])
        with torch.no_grad():
            loss = loaded.model(input_ids=torch.tensor([prompt + reply]), labels=labels).loss
        assert found == pytest.approx(float(loss), rel=1e-5)


def test_own_words_are_the_models_answers_to_bundled_instructions() -> None:
    loaded = tiny_model()
    loaded.model.config.max_position_embeddings = 512
    asked, said = own_words(loaded, 3)
    assert len(asked) == len(said) and len(set(asked)) == len(asked) > 50
    tokens = [len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said]
    assert max(tokens) == LEAST_TOKENS  # fewer would tell nothing


def test_scrutiny_names_the_items_and_counts_what_is_left() -> None:
    texts = ["Sure, bake it.", "I'm sorry, but I'm sorry.", "xq zz", "The tram is late.", "I can't help."]
    items = [SimpleNamespace(id=str(n), prompt=f"p{n}", answer=t, value=float(n < 4)) for n, t in enumerate(texts)]
    run: Any = SimpleNamespace(axes={"compliance": SimpleNamespace(name="compliance", items=items),
                                     "over_refusal": SimpleNamespace(name="over_refusal", items=items)})  # fmt: skip
    fluency: Any = SimpleNamespace(strange=lambda asked, answers: [text == "xq zz" for text in answers])
    skipped: list[list[bool]] = []

    def off_topic(asked: Any, answers: list[str], among: Any, skip: list[bool]) -> list[bool]:
        skipped.append(skip)
        return ["tram" in text for text in answers]

    judge: Any = SimpleNamespace(off_topic=off_topic)
    found = scrutinise(run, fluency, judge)
    assert found == {"compliance": {"complied": ["0", "1", "2", "3"], "sorry": ["1"], "strange": ["2"],
                                    "off topic": ["3"]}}  # fmt: skip
    assert sound(found["compliance"]) == 1
    assert skipped == [[False, True, True, False]]  # what is settled is not read for its topic


def test_skipping_changes_nothing_for_the_others(echo: LoadedModel) -> None:
    said = ["2 3 4 5 2 3", "6 7 8 9 6 7", "10 11 12 13 10 11"]
    whole = relevance(echo, ASKED, said, ASKED, 6)
    found = relevance(echo, ASKED, said, ASKED, 6, [False, True, False])
    assert found == [whole[0], None, whole[2]]
