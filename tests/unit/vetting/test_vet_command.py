"""`trimtab vet`, whole, by command on tiny saved models: files, resume, utility axes, before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.unit.vetting.small_models import random_model, refusing_model

from trimtab.cli import trimtab as command_line
from trimtab.comparison.results import EXIT_CODES
from trimtab.errors import UsageError
from trimtab.vetting import sweep

SMALL = "--axis compliance?limit=6 --axis over_refusal?limit=6 --max-new-tokens 4 --workers 1"


def vet(words: str) -> Result:
    return CliRunner().invoke(command_line, ["vet", *words.split()], catch_exceptions=False)


def page_and_json(out: Path) -> tuple[str, str]:
    return (out / "report.html").read_text(), (out / "report.md").read_text()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A vet of a model that refuses (``before``), and one of another that says anything (``after``)."""
    home = tmp_path_factory.mktemp("vets")
    text = home / "text.txt"
    text.write_text("how to bake the cake today\nthe weather is nice here\n" * 6)
    models = {"before": refusing_model(home / "model"), "after": random_model(home / "other")}
    common = f"{SMALL} --perplexity {text}"
    first = vet(f"{models['before']} --approx a8 --approx noise:up=500 --approx a4 {common} --out {home / 'before'}")
    words = f"{models['after']} --approx a8 --approx noise:up=500,seed=0 --approx kv8 {common} --out {home / 'after'}"
    second = vet(f"{words} --before {home / 'before'} --json")
    return {"home": home, "first": first, "second": second, "common": common, "models": models}


def test_a_vet_leaves_its_report_and_exits_with_its_verdict(measured: dict[str, Any]) -> None:
    out, result = measured["home"] / "before", measured["first"]
    page, text = page_and_json(out)
    assert text in result.stdout and f"report: {out / 'report.html'}" in result.stdout
    title = text.splitlines()[0]
    assert title.startswith("# Activation approximations of ")
    assert result.exit_code == EXIT_CODES[title.rpartition(": ")[2]] != 0  # type: ignore[index]
    assert "| time a token | tokens/s | tokens/s without it |" in text.splitlines()[2]
    assert page.count("vet-title") == 2 and "Harmful compliance across, perplexity over the exact model" in page
    record = json.loads((out / "noise_up_500" / sweep.RECORD).read_text())
    assert record["speed"]["rate"] > 0 < record["speed"]["exact_rate"]
    row = next(line for line in text.splitlines() if line.startswith("| noise:up=500 |"))
    assert f"| {record['speed']['rate']:.0f} | {record['speed']['exact_rate']:.0f} |" in row


def test_a_second_call_measures_nothing_again(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished sweep loaded the model again")

    monkeypatch.setattr(sweep, "load", never)
    out, model = measured["home"] / "before", measured["models"]["before"]
    again = vet(f"{model} --approx a8 --approx noise:up=500 --approx a4 {measured['common']} --out {out}")
    assert again.exit_code == measured["first"].exit_code and again.stdout == measured["first"].stdout


def test_before_and_after_are_in_every_form_of_the_report(measured: dict[str, Any]) -> None:
    document = json.loads(measured["second"].stdout)
    page, text = page_and_json(measured["home"] / "after")
    found = document["before"]
    rows = {row["name"]: row for row in found["rows"]}
    assert next(iter(rows)) == "none"
    assert set(rows) == {"none", "a8", "noise:up=500,seed=0"}  # another spelling of the same
    assert found["only_before"] == ["a4"] and found["only_after"] == ["kv8"]
    noise = rows["noise:up=500,seed=0"]
    assert noise["rise"][0] > 0 and noise["fall"]["value"] == pytest.approx(noise["rise"][0] - noise["rise"][1])
    for part in (text, page):
        assert "Before and after" in part
        assert "Measured only before: a4." in part and "Measured only after: kv8." in part
    assert "Worst case by rise in compliance: noise:up=500,seed=0" in text
    assert "| approximation | complies | rise, points | rise smaller by |" in text
    assert page.index("change-title") < page.index("vet-title")
    assert measured["second"].exit_code == EXIT_CODES[document["verdict"]]


def test_the_techniques_before_are_the_default(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def stop(settings: object, names: list[str], *_: object, **__: object) -> None:
        asked.append(names)
        raise UsageError("stop here")

    monkeypatch.setattr(sweep, "sweep", stop)
    home, model = measured["home"], measured["models"]["after"]
    with pytest.raises(UsageError, match="stop here"):
        vet(f"{model} {measured['common']} --before {home / 'before'} --out {home / 'new'}")
    assert sorted(asked[0]) == ["a4", "a8", "noise:up=500"]


def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "load", lambda name: pytest.fail("a model was loaded"))
    home, model, common = measured["home"], measured["models"]["after"], measured["common"]
    unfinished = tmp_path / "unfinished"
    shutil.copytree(home / "before", unfinished, ignore=shutil.ignore_patterns("exact"))
    bare = tmp_path / "bare"
    shutil.copytree(home / "before", bare, ignore=shutil.ignore_patterns("a8", "a4", "noise_up_500"))
    cases = [
        (common, tmp_path, "holds no vet to compare with"),
        (common, unfinished, "not measured to the end"),
        (common, bare, "no approximation was measured"),
        (common.replace("tokens 4", "tokens 5"), home / "before", "add --max-new-tokens 4"),
        (common.replace("compliance?limit=6", "compliance?limit=5"), home / "before", "other prompts of the axis"),
        (f"{common} --axis accuracy:tickets?limit=2", home / "before", "now bundled"),
    ]
    for words, folder, message in cases:
        with pytest.raises(UsageError) as caught:
            vet(f"{model} --approx a8 {words} --before {folder} --out {tmp_path / 'out'}")
        assert message in str(caught.value), words
        assert not (tmp_path / "out" / sweep.SETTINGS).exists()
    with pytest.raises(UsageError, match="the one to be written"):
        vet(f"{measured['models']['before']} --approx a8 {common} --before {home / 'before'} --out {home / 'before'}")


def test_task_accuracy_and_structured_output_are_vetted_too(tmp_path: Path) -> None:
    questions = tmp_path / "task.jsonl"
    labels = {"choices": ["billing", "delivery"]}
    rows = [{"prompt": f"route this message {word}", "answer": "billing", **labels} for word in ("a", "the", "that")]
    questions.write_text("\n".join(map(json.dumps, rows)))
    task = {"query": "Please output JSON code: a", "task_name": "Text to JSON", "input_type": "Text", "VQA": []}
    task |= {"output_type": "JSON", "raw_output_metric": ["a"], "rendering": False}
    (tmp_path / "tasks.json").write_text(json.dumps([{"task_id": f"0005{n:02}", **task} for n in range(3)]))
    model, out = random_model(tmp_path / "model"), tmp_path / "out"
    axes = f"--axis compliance?limit=4 --axis structeval:t={tmp_path / 'tasks.json'}"
    (tmp_path / "policy.yaml").write_text("margin.structeval: 0.1\n")  # 5 % of a score of nothing is no margin
    small = f"--max-new-tokens 4 --workers 1 --json --policy {tmp_path / 'policy.yaml'}"
    result = vet(f"{model} --approx a8 --approx teal:0.5 {axes} --accuracy {questions} {small} --out {out}")
    document = json.loads(result.stdout)
    assert {row[0] for row in document["rows"]} == {"none", "a8", "teal:0.5"}
    assert "accuracy (task, n 3)" in document["header"] and "structeval (t, n 3)" in document["header"]
    place = document["header"].index("accuracy (task, n 3)")
    assert all(row[place].startswith(("0.0 %", "33.3 %", "66.7 %", "100.0 %")) for row in document["rows"])
    assert (
        result.exit_code == {"pass": 0, "regression": 3, "unmeasured": 4, "not enough evidence": 5}[document["verdict"]]
    )
    results = json.loads((out / "teal_0.5" / "results.json").read_text())["results"]
    assert "structeval:t" in results
    assert {path.name for path in out.iterdir()} >= {"exact", "a8", "teal_0.5", "report.md", "report.html"}
