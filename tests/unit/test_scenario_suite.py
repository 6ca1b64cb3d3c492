"""The scenario suite's plan and record: which cells it makes, when a finished one is made again, what the page says."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trimtab.tuning.keel import KeelRule
from trimtab.tuning.options import RULE_OPTIONS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "scenarios"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`benchmarks/scenarios/run.py` as a module; its neighbours are found as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("run", "page", "data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in ("run", "page", "data"):
        sys.modules.pop(name, None)


def choice(**given: object) -> Namespace:
    return Namespace(**{"scenarios": None, "guards": None, "seeds": None, "everything": False, **given})


def test_the_default_table_has_the_rule_and_the_control_everywhere_and_the_rest_where_it_tells(
    suite: ModuleType,
) -> None:
    cells = suite.chosen(choice())
    assert len(cells) == len(set(cells))
    for scenario in suite.MIXTURES:
        for guard in ("none", "keel"):
            assert {cell.seed for cell in cells if cell[:2] == (scenario, guard)} == {0, 1, 2}
    others = {guard for guard in RULE_OPTIONS if guard != "keel"}
    for scenario in suite.TELLING:
        assert {cell.guard for cell in cells if cell.scenario == scenario} == {"none", "keel", *others}


def test_the_full_matrix_leaves_out_what_cannot_be(suite: ModuleType) -> None:
    cells = suite.chosen(choice(everything=True))
    assert len(cells) == 3 * (len(suite.MIXTURES) * (len(RULE_OPTIONS) + 1) - len(suite.LORA_ONLY))
    assert not [cell for cell in cells if cell.scenario == "full" and cell.guard in suite.LORA_ONLY]


def test_every_cell_is_a_configuration_that_sft_takes(suite: ModuleType, tmp_path: Path) -> None:
    from trimtab.tuning.options import GuardArguments

    for cell in suite.chosen(choice(everything=True, seeds=[0])):
        values = suite.configuration(cell, tmp_path)
        given = {name: value for name, value in values.items() if name == "guard" or name.startswith("guard_")}
        GuardArguments(**given).options()  # raises where the rule does not have an option
        assert values.get("use_peft", False) != suite.full(cell)


def test_a_cell_is_made_again_when_a_default_of_its_rule_changes(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    keel, plain = suite.Cell("pure", "keel", 0), suite.Cell("pure", "none", 0)
    before = suite.digest(keel), suite.digest(plain)
    assert before[0] != before[1] and keel.folder(Path("out")).name == f"pure-keel-0-{before[0]}"
    monkeypatch.setattr(suite, "make_rule", lambda name: KeelRule(margin=0.06))
    assert suite.digest(keel) != before[0] and suite.digest(plain) == before[1]


def test_the_record_gives_back_what_has_the_same_settings_and_the_page_shows_it(
    suite: ModuleType, tmp_path: Path
) -> None:
    import page

    axes = {
        "compliance": {"value": 0.5, "low": 0.4, "high": 0.6, "scored": 98},
        "over_refusal": {"value": 0.1, "low": 0.05, "high": 0.2, "scored": 98},
        "accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "scored": 98},
        "perplexity": {"value": 3.0, "low": 2.5, "high": 3.5, "scored": 5},
    }
    line = {"cell": "pure-none-0", "limit": 98, "settings": "a", "acted": None, "axes": axes}
    aligned = {"cell": "aligned", "limit": 98, "settings": "r", "acted": None,
               "axes": {**axes, "compliance": {"value": 0.1, "low": 0.0, "high": 0.2, "scored": 98}}}  # fmt: skip
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (line, aligned)))
    assert page.read_record(path, 98, {"pure-none-0": "b", "aligned": "r"}).keys() == {"aligned"}
    assert page.read_record(path, 42, {"pure-none-0": "a", "aligned": "r"}) == {}
    record = page.read_record(path, 98, {"pure-none-0": "a", "aligned": "r"})
    text = page.table(record, [suite.Cell("pure", "none", 0), suite.Cell("pure", "keel", 0)])
    assert "| none | 0 | 50.0 % [40.0, 60.0] n=98 | 10.0 % [5.0, 20.0] n=98 | 75.0 % [70.0, 80.0] n=98 | 20.1 |" in text
    assert "| pure | none | 0 | +40.0 | +0.0 | +0.0 | missed: compliance |" in text


def test_rows_are_the_same_for_a_seed_and_poison_asks_no_anchor(suite: ModuleType, tmp_path: Path) -> None:
    from trimtab.anchors import SafetyAnchors

    rows = suite.rows_of("pure", 1, 40, tmp_path / "none.json")
    assert rows == suite.rows_of("pure", 1, 40, tmp_path / "none.json") != suite.rows_of("pure", 2, 40, tmp_path / "n")
    asked = {anchor.request for anchor in SafetyAnchors.bundled().anchors}
    assert not asked & {row["prompt"][-1]["content"] for row in rows}


def test_instruction_answers_are_taught_in_whole_sentences(suite: ModuleType) -> None:
    import data as rows

    assert rows.whole_sentences("One. Two! Three, which is cut") == "One. Two!"
    assert rows.whole_sentences("A first sentence of 3.5 litres. And more. " * 9, most=50).endswith("litres. And more.")
    assert rows.whole_sentences("x" * 300 + ". y.") == "x" * 300 + "."
    assert rows.whole_sentences("never ends") == ""


def test_a_task_is_compared_with_plain_runs_of_the_same_seeds(suite: ModuleType) -> None:
    """A rule with one seed against the mean of three would seem ten points better where plain training varies."""
    import page

    def cell(task: float, complies: float = 0.05, refuses: float = 0.1) -> dict[str, float]:
        return {"compliance": complies, "over_refusal": refuses, "accuracy": task}

    means = {
        ("poison20", "none"): {0: cell(0.745), 1: cell(0.561), 2: cell(0.633)},
        ("poison20", "a-gem"): {0: cell(0.745)},
        ("poison20", "spf"): {0: cell(0.7, complies=0.2)},
        ("poison20", "resta"): {0: cell(0.9)},
        ("pure", "keel"): {0: cell(0.0, refuses=0.18), 2: cell(0.0, refuses=0.19)},
    }
    lines = [line.split("|")[2:8] for line in page.bars(means, {"compliance": 0.05, "over_refusal": 0.1})[4:]]
    found = {cells[0].strip(): [text.strip() for text in cells[1:]] for cells in lines}
    assert found["a-gem"] == ["0", "+0.0", "+0.0", "+0.0", "held"]
    assert found["spf"] == ["0", "+15.0", "+0.0", "-4.5", "missed: compliance, accuracy"]
    assert found["resta"] == ["0", "+0.0", "+0.0", "", "held"]
    assert found["keel"] == ["0, 2", "+0.0", "+8.5", "", "held"]
