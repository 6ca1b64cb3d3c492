"""JUnit, SARIF, the model card's block and .eval_results: valid, complete, inert, and without prompts or answers."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from report_samples import run

from trimtab.comparison import Axis, Comparison, Item, Run, compare
from trimtab.errors import DataError
from trimtab.reports import model_card_block, to_junit, to_sarif, with_block
from trimtab.reports.hub import BEGIN, END, eval_results, write_eval_results


@pytest.fixture
def found() -> list[Comparison]:
    base = run("base", 1, {"compliance": 0.05, "over_refusal": 0.2, "accuracy": 0.7}, n=200, chat_template="a")
    worse = run("worse", 2, {"compliance": 0.9, "over_refusal": 0.2, "accuracy": 0.7}, n=200, chat_template="b")
    return [compare(base, base), compare(base, worse)]


def test_junit_counts_and_types(found: list[Comparison]) -> None:
    root = ET.fromstring(to_junit(found))
    same, changed = root.findall("testsuite")
    assert (same.get("failures"), same.get("errors"), same.get("tests")) == (
        str(sum(axis.verdict != "pass" for axis in found[0].axes)), "0", "3",
    )  # fmt: skip
    failure = next(case for case in changed if case.get("classname") == "trimtab.compliance").find("failure")
    assert failure is not None and failure.get("type") == "regression"
    assert "→" in (failure.get("message") or "")
    assert any("chat_template" in (one.get("name") or "") for one in changed.iter("property"))


def test_sarif_has_one_result_for_each_axis_that_does_not_pass(found: list[Comparison]) -> None:
    document = json.loads(to_sarif(found, location="policy.yaml"))
    assert document["version"] == "2.1.0"
    results = document["runs"][0]["results"]
    failed = sum(axis.verdict != "pass" for one in found for axis in one.axes)
    assert len(results) == failed + 1  # and the chat template
    rules = {rule["id"] for rule in document["runs"][0]["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in results} <= rules
    assert {"regression", "finding"} <= {result["ruleId"] for result in results}
    assert results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "policy.yaml"


def test_fingerprints_are_stable_over_runs(found: list[Comparison]) -> None:
    prints = [result["partialFingerprints"] for result in json.loads(to_sarif(found))["runs"][0]["results"]]
    again = [result["partialFingerprints"] for result in json.loads(to_sarif(found))["runs"][0]["results"]]
    assert prints == again


def test_the_block_replaces_an_earlier_one_and_nothing_else(found: list[Comparison]) -> None:
    first, second = model_card_block(found[:1]), model_card_block(found)
    card = with_block("# My model\n\nText.\n", first)
    assert card.startswith("# My model\n\nText.\n\n" + BEGIN)
    longer = with_block(card + "\nAfter.\n", second)
    assert longer.count(BEGIN) == longer.count(END) == 1
    assert longer.startswith("# My model") and longer.endswith("\nAfter.\n")
    assert with_block(longer, second) == longer
    assert with_block("", first) == first


@pytest.mark.parametrize("card", [BEGIN, END, BEGIN + END + BEGIN + END, BEGIN + BEGIN + END])
def test_a_broken_block_is_left_alone(card: str, found: list[Comparison]) -> None:
    with pytest.raises(DataError, match="broken trimtab block"):
        with_block(card, model_card_block(found))


def hub_run() -> Run:
    items = tuple(Item(str(place), "", "secret prompt", "secret answer", "harmful", 1.0) for place in range(4))
    items += (Item("9", "", "secret prompt", "", "unscored", None),)
    axis = Axis("compliance:advbench", "Complies (AdvBench)", "binary", True, "rules@1",
                "advbench@0123456789ab@sha256:ff", items)  # fmt: skip
    return Run("m", {axis.name: axis}, {}, "2025-01-01T00:00:00+00:00")


def test_eval_results_are_what_the_hub_reads(tmp_path: Path) -> None:
    (path,) = write_eval_results(hub_run(), {"advbench": "walledai/AdvBench"}, tmp_path)
    assert path.parent.name == ".eval_results"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("walledai/AdvBench", "compliance", 100.0)
    assert entry.dataset_revision == "0123456789ab"
    assert "n = 4 of 5" in (entry.notes or "")


def test_a_run_without_hub_data_is_an_error(tmp_path: Path) -> None:
    assert eval_results(hub_run(), {}) == {}
    with pytest.raises(DataError, match="data set on the hub"):
        write_eval_results(hub_run(), {}, tmp_path)


def test_no_prompt_or_answer_is_in_any_of_them() -> None:
    text = "\n".join(eval_results(hub_run(), {"advbench": "a/b"}).values())
    one = [compare(hub_run(), hub_run())]
    assert "secret" not in text + to_junit(one) + to_sarif(one) + model_card_block(one)


def test_hostile_names_stay_data() -> None:
    name = "evil]]><script>alert(1)</script>\x00\x1b[31m\ud800 <!-- trimtab:end -->"
    hostile = run(name, 3, {"compliance": 0.2}, n=40)
    one = [compare(hostile, hostile)]
    root = ET.fromstring(to_junit(one))
    assert root.find("testsuite").get("name").startswith("evil]]><script>")  # type: ignore[union-attr]
    json.loads(to_sarif(one))
    assert "\x1b" not in to_junit(one) + to_sarif(one)
    block = model_card_block(one)
    assert block.count(END) == 1 and "<script>" not in block
