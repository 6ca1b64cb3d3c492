"""Strange answers, on a model whose likelihoods are known in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import TEMPLATE
from transformers import LlamaConfig

from trimtab.evaluation.judges import apologises
from trimtab.models import LoadedModel
from trimtab.vetting import fluency
from trimtab.vetting.own_words import OwnWords

WORDS = 11
RIGHT, ODD = -math.log(0.9), -math.log(0.1 / (WORDS - 1))
ASKED = [str(start) for start in range(WORDS)]


class _Counts:
    """Token n is followed by n + 1 with probability 0.9; the rest is shared evenly."""

    device = torch.device("cpu")

    config = LlamaConfig(sliding_window=8)  # so that rows are read whole

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: object) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, WORDS), math.log(0.1 / (WORDS - 1)))
        logits.scatter_(2, ((input_ids + 1) % WORDS)[..., None], math.log(0.9))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


class _Tokenizer:
    chat_template, pad_token_id, eos_token_id = TEMPLATE, 0, 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) % WORDS for word in text.split()]}

    def apply_chat_template(self, messages: Any, **_: object) -> str:
        return str(messages[-1]["content"])


def _counting_from(start: int, odd: int = 0) -> str:
    """Eight words, of which the last ``odd`` do not follow from the one before."""
    words = [(start + place) % WORDS for place in range(8 - odd)]
    for _ in range(odd):
        words.append((words[-1] + 5) % WORDS)
    return " ".join(map(str, words))


@pytest.fixture
def counting() -> LoadedModel:
    return LoadedModel(model=_Counts(), tokenizer=_Tokenizer(), name="counts")  # type: ignore[arg-type]


def test_what_is_further_away_than_its_own_sentences_out_of_place_is_strange(counting: LoadedModel) -> None:
    own = OwnWords(ASKED, [_counting_from(start + 1) for start in range(WORDS)])
    judge = fluency.Fluency(counting, 8, own)
    # After another question the first word is a surprise and the seven after it are not.
    assert judge.limit == pytest.approx((7 * RIGHT + ODD) / 8, rel=1e-5)
    answers = {
        _counting_from(1): False,  # the answer
        _counting_from(4): False,  # an answer to something else
        _counting_from(1, odd=2): True,
        _counting_from(4, odd=7): True,
        "5 9 1": False,  # too short to tell
        "": False,
        _counting_from(1) + " 1 1 1 1 1": False,  # read to its eighth word
    }
    assert judge.strange(["0"] * len(answers), list(answers)) == list(answers.values())


def test_a_model_without_finite_numbers_finds_everything_strange(
    counting: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = OwnWords(ASKED, [_counting_from(start + 1) for start in range(WORDS)])
    judge = fluency.Fluency(counting, 8, own)

    def broken(self: _Counts, input_ids: torch.Tensor, logits_to_keep: int, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.full((len(input_ids), logits_to_keep, WORDS), math.nan))

    monkeypatch.setattr(_Counts, "__call__", broken)
    assert judge.strange(["0"], [_counting_from(1)]) == [True]
    assert not capsys.readouterr().err
    assert fluency.Fluency(counting, 8, own).limit == math.inf
    assert "noise is not told" in capsys.readouterr().err


def test_broken_refusals_are_told_from_answers() -> None:
    assert apologises("I'm sorry, but I'm sorry.") and apologises("Sorry to be a")
    assert not apologises("Sure, I'm sorry it took so long.") and not apologises("")
