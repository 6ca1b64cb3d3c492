"""Naming an axis with its settings; every utility axis from the command line and from inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab.errors import UsageError
from trimtab.evaluation import batching
from trimtab.evaluation.axes import AxisSpec, with_match
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import evaluate
from trimtab.generation import Generation

ANSWERS = {"add": "First 2, then 5, so 12 apples", "sum": "#### 7", "say": "the garden gate was open"}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: Any, chats: Any, settings: Any) -> list[Generation]:
        found = [ANSWERS[chat[-1]["content"].split()[0]] for chat in chats]
        return [Generation(text, len(text.split()), 5, False) for text in found]

    monkeypatch.setattr(batching, "answer", in_batches(answer))


def questions(folder: Path) -> Path:
    path = folder / "q.jsonl"
    rows = [{"question": "add up", "answer": "7+5\n#### 12"}, {"question": "sum up", "answer": "3+4\n#### 7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("accuracy=a/q.jsonl?match=gsm8k", {"kind": "accuracy", "path": "a/q.jsonl", "match": "gsm8k"}),
        ("rouge=d.jsonl?which=rouge1&limit=7", {"kind": "rouge", "which": "rouge1", "limit": 7}),
        ("perplexity=w.txt?window_chars=400", {"kind": "perplexity", "window_chars": 400}),
        ("compliance:advbench?revision=ab12", {"dataset": "advbench", "revision": "ab12", "path": None}),
        ("xstest-safe?revision=ab12", {"kind": "over_refusal", "revision": "ab12"}),
        ("or-bench=f.csv", {"kind": "over_refusal", "dataset": "or-bench"}),
        ("compliance?split=train", {"dataset": "bundled", "split": "train"}),
        ("accuracy=what?.jsonl", {"path": "what?.jsonl"}),
    ],
)
def test_settings_behind_a_question_mark(text: str, wanted: dict[str, Any]) -> None:
    spec = AxisSpec.parse(text)
    assert {key: getattr(spec, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("accuracy=q.jsonl?mach=gsm8k", "unknown setting"),
        ("accuracy=q.jsonl?match=fuzzy", "does not know"),
        ("compliance?match=exact", "no setting 'match'"),
        ("choice=q.jsonl?which=rouge1", "no setting 'which'"),
        ("rouge=q.jsonl?limit=none", "whole number"),
        ("perplexity=w.txt?window_chars=0", "whole number"),
        ("compliance:advbench?revision=", "does not know"),
        ("lm_eval:arc_easy?revision=ab", "no setting 'revision'"),
    ],
)
def test_wrong_settings_are_named(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        AxisSpec.parse(text)


def test_a_file_whose_name_holds_a_question_mark_is_found(tmp_path: Path) -> None:
    path = tmp_path / "odd?match=exact"
    path.write_text("x")
    spec = AxisSpec.parse(f"accuracy={path}")
    assert (spec.path, spec.match) == (str(path), None)


def test_match_goes_to_accuracy_axes_without_one() -> None:
    specs = [AxisSpec.parse(text) for text in ("compliance", "accuracy=a.jsonl", "accuracy=b.jsonl?match=exact")]
    assert [spec.match for spec in with_match(specs, "number")] == [None, "number", "exact"]
    with pytest.raises(UsageError, match="does nothing"):
        with_match(specs[:1], "number")


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("match", "values"), [("gsm8k", [0.0, 1.0]), ("number", [1.0, 1.0]), ("exact", [0.0, 0.0])])
def test_the_rule_decides_and_is_recorded(tmp_path: Path, match: str, values: list[float]) -> None:
    axis = AxisSpec.parse(f"accuracy={questions(tmp_path)}?match={match}")
    run = evaluate(tiny_model(), [axis], out=tmp_path / "run", progress=False)
    found = run.axes["accuracy:q"]
    assert [item.value for item in found.items] == values
    assert found.judge == f"label-match@1/{match}"  # two rules are never compared with each other


@pytest.mark.usefixtures("scripted")
def test_another_rouge_is_another_judge(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "say it", "answer": "open was the garden gate"}) + "\n")
    found = {}
    for which in ("rouge1", "rougeL"):
        axis = AxisSpec.parse(f"rouge={path}?which={which}")
        run = evaluate(tiny_model(), [axis], out=tmp_path / which, progress=False)
        found[which] = run.axes["rouge:d"]
    assert found["rouge1"].items[0].value == pytest.approx(1.0)  # the same words
    assert found["rougeL"].items[0].value == pytest.approx(0.6)  # the longest common run of words is 3 of 5
    assert found["rouge1"].judge.endswith("/rouge1")


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("task", ["trimtab/rouge", "trimtab/choice", "trimtab/accuracy"])
def test_inspect_finds_the_utility_tasks(tmp_path: Path, task: str) -> None:
    if task == "trimtab/rouge":
        pytest.importorskip("rouge_score", reason="needs rouge-score")
    from inspect_ai import eval as inspect_eval

    from trimtab.evaluation.provider import provider_for

    path = tmp_path / "q.jsonl"
    row = {"question": "say it", "answer": "Yeast", "choices": ["Salt", "Yeast"]}
    path.write_text(json.dumps(row) + "\n")
    (log,) = inspect_eval(
        task, model=provider_for(tiny_model()), task_args={"path": str(path)}, log_dir=str(tmp_path), display="none"
    )
    assert log.status == "success"
    assert len(read_run(tmp_path).axes) == 1
