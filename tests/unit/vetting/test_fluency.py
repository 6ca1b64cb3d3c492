"""Strange answers, on a model whose likelihoods are known in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tests.unit.approximation.families import family, token_rows

from trimtab.evaluation.judges import apologises
from trimtab.models import LoadedModel
from trimtab.vetting import fluency

WORDS = 11


class _Counts:
    """Token n is followed by n + 1 with probability 0.9; the rest is shared evenly."""

    def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, WORDS), math.log(0.1 / (WORDS - 1)))
        logits.scatter_(2, ((input_ids + 1) % WORDS)[..., None], math.log(0.9))
        return SimpleNamespace(logits=logits)


def _tokenizer(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [int(word) % WORDS for word in text.split()]}


@pytest.fixture
def counting() -> LoadedModel:
    model = _Counts()
    model.device = torch.device("cpu")  # type: ignore[attr-defined]
    return LoadedModel(model=model, tokenizer=_tokenizer, name="counts")  # type: ignore[arg-type]


def test_answers_in_no_order_are_strange_and_short_ones_never(
    counting: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [[place % WORDS for place in range(start, start + 8)] for start in range(50)]
    usual[0] = [0, *usual[0][:7]]  # one piece with one odd step in seven: the limit lies near it
    monkeypatch.setattr(fluency, "ordinary_pieces", lambda tokenizer, tokens: usual)
    judge = fluency.Fluency(counting, 8)
    right, odd = -math.log(0.9), -math.log(0.1 / (WORDS - 1))
    assert right < judge.limit < right * 6 / 7 + odd / 7
    answers = ["1 2 3 4 5 6 7 8", "5 9 1 7 3 10 2 8", "5 9 1", "", "2 3 4 5 6 7 8 9 1 1 1 1 1"]
    assert judge.strange(answers) == [False, True, False, False, False]  # the last is read to its eighth token


def test_nats_of_rows_are_those_of_transformers() -> None:
    loaded = LoadedModel(model=family("llama"), tokenizer=None, name="x")  # type: ignore[arg-type]
    rows = [*token_rows(2, 9), *token_rows(1, 5, seed=3)]
    for row, found in zip(rows, fluency.row_nats(loaded, rows), strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            assert found == pytest.approx(float(loaded.model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_a_model_without_finite_numbers_finds_everything_strange(
    counting: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fluency, "ordinary_pieces", lambda tokenizer, tokens: [list(range(8))] * 20)
    judge = fluency.Fluency(counting, 8)
    broken = torch.full((1, 8, WORDS), math.nan)
    monkeypatch.setattr(_Counts, "__call__", lambda self, input_ids, **_: SimpleNamespace(logits=broken))
    assert judge.strange(["1 2 3 4 5 6 7 8"]) == [True]


def test_broken_refusals_are_told_from_answers() -> None:
    assert apologises("I'm sorry, but I'm sorry.") and apologises("Sorry to be a")
    assert not apologises("Sure, I'm sorry it took so long.") and not apologises("")
