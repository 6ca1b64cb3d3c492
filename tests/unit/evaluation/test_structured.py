"""Structured output as an axis: measured, written, read again and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_model

from trimtab.comparison import compare
from trimtab.evaluation import batching, structured
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    rows = [
        {"task_id": f"0005{n:02}", "query": f"Please output JSON code: {n}", "task_name": "Text to JSON",
         "input_type": "Text", "output_type": "JSON", "raw_output_metric": ["a", "b"], "VQA": [], "rendering": False}
        for n in range(30)
    ]  # fmt: skip
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(rows))
    return path


def measured(answer: str, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def answers(loaded, chats, settings, *_, **__):  # type: ignore[no-untyped-def]
        assert settings.max_new_tokens == structured.MIN_AXIS_TOKENS  # 64 tokens hold no document
        assert all("BEGIN_CODE" in chat[-1]["content"] for chat in chats)
        return [Generation(answer, 3, 5, False) for _ in chats]

    monkeypatch.setattr(batching, "generate", answers)
    model = tiny_model()
    model.model.config.max_position_embeddings = 4096
    return evaluate(model, [AxisSpec.parse(f"structeval:t={data}")], out=out, progress=False)


def test_structured_output_is_an_axis_of_eval_and_compare(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = measured('<|BEGIN_CODE|>{"a": 1, "b": 2}<|END_CODE|>', data_file, tmp_path / "good", monkeypatch)
    axis = run.axes["structeval:t"]
    assert axis.kind == "continuous"
    assert not axis.lower_is_better
    assert [item.value for item in axis.items] == [1.0] * 30
    assert {item.category for item in axis.items} == {"Text to JSON"}
    assert json.loads((tmp_path / "good" / "results.json").read_text())["results"]["structeval:t"]["score,none"] == 1.0
    measured("Sorry, I can't.", data_file, tmp_path / "bad", monkeypatch)
    found = compare(read_run(tmp_path / "good"), read_run(tmp_path / "bad"))
    assert found.verdict == "regression"


def test_every_sample_records_both_scores(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inspect_ai.log import read_eval_log

    measured('{"a": "\\"x\\""}', data_file, tmp_path / "run", monkeypatch)
    (path,) = (tmp_path / "run").glob("*.eval")
    samples = read_eval_log(str(path)).samples or []
    marks = next(iter((samples[0].scores or {}).values())).metadata or {}
    assert marks["official"]["final_eval_score"] == 0.0
    assert marks["value"] == pytest.approx(0.6)
    assert "escape" in marks["differences"][0]
    assert marks["missing"] == ["b"]


def test_inspect_finds_the_tasks(data_file: Path) -> None:
    from trimtab.evaluation import registry

    assert {name for name in registry.__all__ if name.startswith("structeval")} == {
        "structeval", "structeval_t_gen", "structeval_t_conv", "structeval_v_gen", "structeval_v_conv"
    }  # fmt: skip
    task = structured.structeval_t_gen(dataset=str(data_file), limit=3)
    assert task.name == "structeval-t-gen"
    assert len(task.dataset) == 3


def test_the_default_names_all_quadrants(data_file: Path) -> None:
    assert len(structured.axis_tasks("bundled", str(data_file), None)) == 30
    assert len(structured.axis_tasks("t-gen", str(data_file), 4)) == 4
