from __future__ import annotations

import pytest

from trimtab.evaluation.grading import is_correct, last_number, normalise_answer

LABELS = ["billing", "delivery", "billing dispute"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("billing", True),
        ("Billing.", True),
        ("**Billing**", True),
        ("Answer: billing", True),
        ("The label is billing, because a card was charged.", True),
        ("billing\ndelivery", True),
        ("billings", False),
        ("billing dispute", False),
        ("delivery", False),
        ("I think it is billing", False),
    ],
)
def test_choice_counts_the_label_that_the_answer_begins_with(answer: str, right: bool) -> None:
    assert is_correct(answer, "billing", LABELS) is right


@pytest.mark.parametrize("answer", ["", "  ", "...", "\n"])
def test_silence_is_unscored(answer: str) -> None:
    assert is_correct(answer, "billing", LABELS) is None


def test_exact_match_ignores_case_space_and_edges() -> None:
    assert is_correct(" Paris. ", "paris")
    assert is_correct("New  York", "new york")
    assert not is_correct("Paris, France", "Paris")


def test_number_takes_the_last_one() -> None:
    assert is_correct("3 + 4 = 7, so 1,007 in all.", "work...\n#### 1007", match="number")
    assert not is_correct("7", "8", match="number")
    assert not is_correct("seven", "7", match="number")
    assert last_number("#### -1,234.5") == -1234.5


def test_normalise_answer() -> None:
    assert normalise_answer(" *`Yes`!* ") == "yes"
