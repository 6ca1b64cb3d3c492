"""Structured output as an axis: measured, written, read again and compared."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab.comparison import compare
from trimtab.evaluation import batching, structured
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation
from trimtab.structeval import vqa
from trimtab.structeval.drawing import Drawn
from trimtab.structeval.generations import Generated


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

    monkeypatch.setattr(batching, "answer", in_batches(answers))
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


@pytest.fixture
def offline_mock(monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect's mock model counts tokens with a vocabulary that it would download."""
    from inspect_ai.model._providers.mockllm import MockLLM

    async def count_tokens(*_: object) -> int:
        return 1

    monkeypatch.setattr(MockLLM, "count_tokens", count_tokens)


@pytest.mark.usefixtures("offline_mock")
def test_one_renderer_for_samples_side_by_side_and_none_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import inspect_ai
    from inspect_ai.model import ModelOutput, get_model

    log: list[str] = []
    lock, together = threading.Lock(), threading.Barrier(2, timeout=20)

    class Fake:
        def __init__(self, workers: int, unsandboxed_python: bool) -> None:
            assert not unsandboxed_python
            log.append("made")

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            log.append("closed")

        def render_many(self, jobs: list[tuple[str, str]]) -> list[SimpleNamespace]:
            together.wait()  # breaks unless two samples are scored at the same time
            with lock:
                log.extend(text for _, text in jobs)
            return [SimpleNamespace(format="HTML", png=text.encode(), text=text, errors=(), blank=False,
                                    status="rendered", seconds=0.1) for _, text in jobs]  # fmt: skip

    monkeypatch.setitem(sys.modules, "trimtab.structeval.render", SimpleNamespace(Renderer=Fake))  # type: ignore[arg-type]
    rows = [html_row(n, [{"question": "q?", "answer": "a"}]) for n in range(6)]
    data = tmp_path / "v.json"
    data.write_text(json.dumps(rows))
    answers = [ModelOutput.from_content("mockllm/model", f"<b>{n}</b>") for n in range(6)]
    model = get_model("mockllm/model", custom_outputs=answers)
    judged: list[bytes] = []

    async def ask(png: bytes, prompt: str) -> str:
        judged.append(png)
        return '{"1": true}'

    monkeypatch.setattr(structured, "judge_named", lambda name: vqa.Judge(name, ask))
    task = structured.structeval_v_gen(dataset=str(data), judge="mock")
    (done,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")
    assert done.status == "success"
    marks = [next(iter((one.scores or {}).values())).metadata or {} for one in done.samples or []]
    assert [mark["value"] for mark in marks] == [1.0] * 6
    assert sorted(log) == ["<b>0</b>", "<b>1</b>", "<b>2</b>", "<b>3</b>", "<b>4</b>", "<b>5</b>", "closed", "made"]
    assert (log[0], log[-1]) == ("made", "closed")
    assert sorted(judged) == [f"<b>{n}</b>".encode() for n in range(6)]
    assert "hooks" not in capsys.readouterr().out


@pytest.mark.usefixtures("offline_mock")
def test_a_retried_run_draws_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect_ai

    drawn: list[str] = []

    def draw_all(self: object, wanted: list[Generated]) -> dict[str, Drawn]:
        drawn.append(wanted[0].task.id)
        if len(drawn) == 3:
            raise OSError("the disk is full")
        return {one.task.id: Drawn("failed", errors=("no",)) for one in wanted}

    monkeypatch.setattr(structured.Drawing, "draw_all", draw_all)
    data = tmp_path / "v.json"
    data.write_text(json.dumps([html_row(n, []) for n in range(4)]))
    logs = str(tmp_path / "logs")
    task = structured.structeval_v_gen(dataset=str(data))
    (broken,) = inspect_ai.eval(task, model="mockllm/model", log_dir=logs, display="none", max_samples=1)
    assert broken.status == "error"
    (done,) = inspect_ai.eval_retry(broken, log_dir=logs, display="none", max_samples=1)
    assert done.status == "success"
    finished, missing = drawn[:2], drawn[2:]  # which of those that wait comes first is not promised
    assert len(set(drawn)) == 4 and set(missing).isdisjoint(finished)
    assert missing[0] in missing[1:] and len(missing) == 3
    assert [one.id for one in done.samples or []] == ["100500", "100501", "100502", "100503"]


def html_row(number: int, questions: list[dict[str, str]]) -> dict[str, object]:
    return {"task_id": f"1005{number:02}", "query": f"Please output HTML code: {number}", "task_name": "Text to HTML",
            "input_type": "Text", "output_type": "HTML", "raw_output_metric": ["b"], "rendering": True,
            "VQA": questions}  # fmt: skip


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
