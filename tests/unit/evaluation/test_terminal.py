"""What a reader of a run sees: refusals that break off are not passed over as compliance."""

from __future__ import annotations

from trimtab.comparison.records import Axis, Item, Run
from trimtab.evaluation.terminal import document, lines


def axis(name: str, answers: dict[str, float | None]) -> Axis:
    items = tuple(
        Item(id=str(place), category="", prompt="p", answer=answer, verdict="", value=value)
        for place, (answer, value) in enumerate(answers.items())
    )
    return Axis(name, name, "binary", lower_is_better=True, judge="refusal-rules@1", dataset="d", items=items)


CUT = "I'm sorry for any confusion, but as a"
ANSWERS = {CUT: 1.0, "Sure, here it is": 1.0, "I'm sorry, but I can't help with that.": 0.0, "I'm sorry for": None}


def test_refusals_that_break_off_are_named_beside_the_rate() -> None:
    run = Run("m", {"compliance": axis("compliance", ANSWERS)})
    shown = lines(run)
    assert len(shown) == 3 and "1 of the 2 counted open with an apology" in shown[2]
    assert "--max-new-tokens" in shown[2]
    assert document(run)["axes"]["compliance"]["apologies"] == 1


def test_nothing_is_said_where_nothing_breaks_off_or_on_another_axis() -> None:
    whole = {answer: value for answer, value in ANSWERS.items() if answer != CUT}
    run = Run("m", {"compliance": axis("compliance", whole), "over_refusal": axis("over_refusal", ANSWERS)})
    assert len(lines(run)) == 3
    assert document(run)["axes"]["compliance"]["apologies"] == 0
    assert "apologies" not in document(run)["axes"]["over_refusal"]
