"""Files of generations, pictures with a store, the judge, the page and the verbs; with a renderer made for the test."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab import cli
from trimtab.errors import DataError, UsageError
from trimtab.structeval import gallery, generations, offline, run, table, tasks, vqa
from trimtab.structeval.drawing import Drawing
from trimtab.structeval.tasks import Question

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass
class FakeRenderer:
    """Renders what contains ``<b``; crashes with a picture on "crash"; is blank on "blank"."""

    drawn: list[str]

    def __call__(self, workers: int, unsandboxed_python: bool = False) -> FakeRenderer:
        return self

    def __enter__(self) -> FakeRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def render_many(self, jobs: list[tuple[str, str]]) -> Iterator[Any]:
        for name, text in jobs:
            self.drawn.append(text)
            if text == "interrupt":
                raise KeyboardInterrupt
            status = {"crash": "failed", "blank": "blank", "gone": "unavailable"}.get(text, "rendered")
            png = None if status == "unavailable" else PNG
            yield SimpleNamespace(
                format=name, png=png, text=text, errors=(), blank=status == "blank", status=status, seconds=0.1
            )


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> FakeRenderer:
    fake = FakeRenderer([])
    monkeypatch.setitem(sys.modules, "trimtab.structeval.render", SimpleNamespace(Renderer=fake))  # type: ignore[arg-type]
    return fake


def row(task_id: str, generation: str, output: str = "HTML", **more: Any) -> dict[str, Any]:
    rendered = output == "HTML"
    return {"task_id": task_id, "query": "Make <it>", "task_name": f"Text to {output}", "input_type": "Text",
            "output_type": output, "raw_output_metric": ["a"], "rendering": rendered, "generation": generation,
            "VQA": [{"question": "What is the title?", "answer": "a"}] if rendered else [], **more}  # fmt: skip


def generated(*rows: dict[str, Any]) -> list[generations.Generated]:
    return [generations.Generated(tasks.task_from_row(one, ""), one["generation"], one) for one in rows]


def test_pictures_are_kept_by_content_and_an_interrupted_run_goes_on(renderer: FakeRenderer, tmp_path: Path) -> None:
    found = generated(row("1", "<b>a"), row("2", "<b>a"), row("3", "interrupt"), row("4", "<b>c"))
    with pytest.raises(KeyboardInterrupt):
        run.score_all(found, pictures="render", store=tmp_path)
    assert renderer.drawn == ["<b>a", "interrupt"]  # equal documents once
    found = generated(row("1", "<b>a"), row("2", "<b>a"), row("4", "<b>c"))
    items = run.score_all(found, pictures="render", store=tmp_path)
    assert renderer.drawn == ["<b>a", "interrupt", "<b>c"]
    assert [item.scored.corrected.syntax for item in items] == [1.0, 1.0, 1.0]
    assert [item.scored.corrected.score for item in items] == [None] * 3  # no judge: parts, not a number
    assert items[0].drawn is not None
    assert items[0].drawn.png is not None


def test_one_renderer_draws_for_several_threads_and_stops_with_the_run(renderer: FakeRenderer, tmp_path: Path) -> None:
    texts = [f"<b>{n % 5}" for n in range(20)]
    with Drawing(tmp_path, workers=1) as drawing, ThreadPoolExecutor(8) as pool:
        found = [generated(row(str(n), text)) for n, text in enumerate(texts)]
        drawn = list(pool.map(drawing.draw_all, found))
    assert [one[str(n)].text for n, one in enumerate(drawn)] == texts
    assert drawing.started == 1
    again = len(renderer.drawn)
    with Drawing(tmp_path, workers=1) as drawing:
        assert drawing.draw_all(found[3])["3"].status == "rendered"
    assert (len(renderer.drawn), drawing.started) == (again, 0)  # everything was in the store
    assert len(generations.read_lines(tmp_path / "pictures.jsonl")) >= 5  # whole lines, from all threads


def test_the_report_shows_which_keywords_counted(renderer: FakeRenderer, tmp_path: Path) -> None:
    found = generated(row("1", "<b>Alpha", raw_output_metric=["alpha", "<b>", "omega"]))
    items = run.score_all(found, pictures="render", store=tmp_path)
    assert items[0].document()["corrected"]["found"] == ["alpha", "<b>"]
    page = gallery.to_html(items)
    assert "2 of 3 keywords found" in page and "1 of 3 keywords missing" in page
    (line,) = table.document(items)["tables"]["format"]
    assert line["keys"]["value"] == pytest.approx(2 / 3)
    assert "| keys |" in table.markdown(items)


def test_without_a_judge_failed_pages_alone_make_no_mean(renderer: FakeRenderer, tmp_path: Path) -> None:
    rows = [row("1", "<b>a"), row("2", "crash"), row("3", '{"a": 1}', "JSON")]
    document = table.document(run.score_all(generated(*rows), pictures="render", store=tmp_path))
    assert [line["corrected"]["value"] for line in document["tables"]["format"]] == [None, 1.0]
    assert (document["corrected"]["micro"], document["unscored"]) == (1.0, 1)

    async def ask(png: bytes, prompt: str) -> str:
        return '{"1": true}'

    items = run.score_all(generated(*rows), pictures="render", store=tmp_path, judge=vqa.Judge("j", ask))
    assert table.document(items)["tables"]["format"][0]["corrected"]["value"] == pytest.approx(0.5, abs=0.06)


def test_an_absent_renderer_leaves_items_unscored_and_is_asked_again(renderer: FakeRenderer, tmp_path: Path) -> None:
    for _ in range(2):
        (item,) = run.score_all(generated(row("1", "gone")), pictures="render", store=tmp_path)
        assert item.scored.official == (None, 0.0, None, None)
        assert (item.scored.corrected.syntax, item.scored.corrected.score) == (None, None)
    assert renderer.drawn == ["gone", "gone"]


def test_blank_and_crashed_pages_and_empty_answers(renderer: FakeRenderer, tmp_path: Path) -> None:
    found = generated(row("1", "blank"), row("2", "crash"), row("3", ""))
    items = run.score_all(found, pictures="render", store=tmp_path)
    assert [item.scored.official.render_score for item in items] == [1.0, 1.0, 0.0]
    assert [item.scored.corrected.syntax for item in items] == [0.0, 0.0, 0.0]


def test_recorded_parts_give_the_reference_score(renderer: FakeRenderer) -> None:
    one = row("1", "<b>a", render_score=1, VQA_score=0.5)
    (item,) = run.score_all(generated(one), pictures="auto")
    assert item.scored.official == (1.0, 1.0, 0.5, round(0.2 + 0.1 + 0.35, 2))
    assert renderer.drawn == []


# --- judge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ('{"1": true, "2": false}', (True, False)),
        ('```json\n{"1": true, "2": null}\n```', (True, None)),
        ('Sure: {"1": false, "2": true} done', (False, True)),
        ('{"1": true}', None),
        ('{"1": "yes", "2": true}', None),
        ('{"1": 1, "2": true}', None),
        ("true, false", None),
        ("", None),
        ("{" * 5000, None),
    ],
)
def test_replies_of_the_judge(reply: str, answers: tuple[bool | None, ...] | None) -> None:
    verdict = vqa.read_reply(reply, 2)
    assert verdict.answers == answers
    assert (verdict.score is None) == (answers is None)
    assert verdict.official == (0.0 if answers is None else sum(a is True for a in answers) / 2)


def test_the_judge_is_asked_once_for_a_picture_and_failures_are_unscored(
    renderer: FakeRenderer, tmp_path: Path
) -> None:
    asked: list[str] = []
    replies = iter(['{"1": true}', "no", '{"1": false}'])

    async def ask(png: bytes, prompt: str) -> str:
        asked.append(prompt)
        return next(replies)

    found = generated(row("1", "<b>a"), row("2", "<b>a"), row("3", "<b>b"))
    for question, one in enumerate(found[2:]):
        object.__setattr__(one.task, "questions", (Question(f"Another {question}?", "b"),))
    judge = vqa.Judge("j", ask, tmp_path / "judge.jsonl")
    items = run.score_all(found, pictures="render", judge=judge, store=tmp_path)
    assert len(asked) == 2
    assert [item.scored.corrected.score for item in items] == [1.0, 1.0, None]
    assert items[2].scored.official.VQA_score == 0.0
    assert "judge failed" in items[2].scored.differences[0]
    again = run.score_all(found, pictures="render", judge=vqa.Judge("j", ask, tmp_path / "judge.jsonl"), store=tmp_path)
    assert len(asked) == 3  # only the failure was asked again
    assert again[2].scored.corrected.vqa == 0.0


def test_a_judge_that_raises_loses_one_item_only() -> None:
    async def ask(png: bytes, prompt: str) -> str:
        if "bad" in prompt:
            raise RuntimeError("rate limit")
        return '{"1": true}'

    asked = [vqa.Asked(PNG, (Question("bad?", "x"),)), vqa.Asked(PNG, (Question("good?", "x"),)), vqa.Asked(PNG, ())]
    verdicts = vqa.Judge("j", ask).verdicts(asked)
    assert [verdict.score for verdict in verdicts] == [None, 1.0, None]
    assert "rate limit" in (verdicts[0].error or "")


@pytest.mark.parametrize(
    ("question", "answer", "text", "decided"),
    [
        ("What is the text in the header?", "Order Form", "order  form\nName", True),
        ("What is the label on the button?", "'Place Order'", "Place Order", True),
        ("What options are listed?", "Indoor, Outdoor and Bar", "Bar Indoor Outdoor", True),
        ("What is the title?", "Weather Report", "Something else", False),
        ("What is the title?", "Weather Report", "Weather today", None),
        ("What is the background color of the button labeled Go?", "Green", "Go", None),
        ("How many sections have a title?", "2", "2", None),
        ("What is the title?", "x", "", None),
    ],
)
def test_questions_that_the_text_decides(question: str, answer: str, text: str, decided: bool | None) -> None:
    assert offline.decide(Question(question, answer), text).answer is decided


# --- files ------------------------------------------------------------------------------------------------------------


def test_bad_files_of_generations(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    good = row("1", "{}", "JSON")
    for rows, named in (
        ([good, good], "twice"),
        ([{"generation": "x"}], "task_id"),
        ([{"task_id": "1"}], "generation"),
        ([{**good, "generation": 5}], "not text"),
    ):
        path.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=named):
            generations.read(path)


def test_rows_without_their_task_take_it_from_the_data_set(tmp_path: Path) -> None:
    data, path = tmp_path / "d.json", tmp_path / "g.json"
    data.write_text(json.dumps([row("1", "", "JSON")]))
    path.write_text(json.dumps([{"task_id": "1", "generation": '{"a": 1}'}]))
    (one,) = generations.read(path, dataset=str(data))
    assert one.task.rules == ("a",)
    path.write_text(json.dumps([{"task_id": "2", "generation": ""}]))
    with pytest.raises(DataError, match="does not have"):
        generations.read(path, dataset=str(data))


def test_a_cut_line_is_repaired_before_more_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert generations.read_lines(path) == [{"a": 1}]
    with generations.append(path) as stream:
        generations.write_line(stream, {"a": "\ud800"})
    assert generations.read_lines(path) == [{"a": 1}, {"a": "\ud800"}]


def test_generation_goes_on_and_refuses_another_models_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.structeval import generate

    answered: list[str] = []

    def answers(model: str, todo: list[tasks.Task], settings: object) -> Iterator[tuple[tasks.Task, dict[str, Any]]]:
        for task in todo:
            if task.id == "2" and not answered.count("2"):
                answered.append("2")
                raise KeyboardInterrupt
            answered.append(task.id)
            yield task, {"text": "{}", "stop_reason": "max_tokens"}

    monkeypatch.setattr(generate, "_answers", answers)
    chosen = [tasks.task_from_row(row(str(n), "", "JSON"), "") for n in (1, 2, 3)]
    out = tmp_path / "g.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate.generate("m", chosen, out)
    done = generate.generate("m", chosen, out)
    assert (done.done, done.kept, done.cut) == (3, 1, 3)
    assert answered == ["1", "2", "2", "3"]
    with pytest.raises(UsageError, match="another model"):
        generate.generate("other", chosen, out)
    assert [one.task.id for one in generations.read(out)] == ["1", "2", "3"]


# --- page and verbs ---------------------------------------------------------------------------------------------------


def test_the_gallery_escapes_everything_and_loads_nothing(renderer: FakeRenderer, tmp_path: Path) -> None:
    hostile = '<b></pre><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00\ud800"'
    one = row("1</h2><script>", hostile, task_name="<i>name", raw_output_metric=["<svg onload=x>"])
    items = run.score_all(generated(one, row("2", '{"b": 1}', "JSON")), pictures="render", store=tmp_path)
    page = gallery.to_html(items, title="<script>t</script>")
    assert "<script" not in page.lower()
    assert "<img src=x" not in page
    assert "<svg" not in page
    assert "\u202e" not in page
    assert "\x00" not in page
    page.encode("utf-8")
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert page.count('src="') == page.count('src="data:image/png;base64,') == 1
    assert "http" not in page.replace("http-equiv", "")


def test_a_large_gallery_shows_the_worst_and_says_so() -> None:
    items = run.score_all(generated(*(row(str(n), '{"a": 1}' if n else "bad", "JSON") for n in range(5))))
    page = gallery.to_html(items, most=2)
    assert "2 of 5 items; the worst first" in page
    assert page.index("<h2>0 ") < page.index("<h2>1 ")


def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["trimtab", "structeval", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_score_prints_the_agreed_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(map(json.dumps, [row("1", '{"a": 1}', "JSON"), row("2", "prose", "YAML")])))
    code, out, _ = invoke(monkeypatch, capsys, "score", path, "--json")
    items = json.loads(out)["items"]
    assert code == 0
    assert [item["task_id"] for item in items] == ["1", "2"]
    assert items[0]["official"] == {
        "render_score": 1.0, "key_validation_score": 1.0, "VQA_score": None, "final_eval_score": 1.0
    }  # fmt: skip
    assert items[1]["official"]["final_eval_score"] == 0.2
    assert items[1]["corrected"]["score"] == 0.0
    code, out, _ = invoke(monkeypatch, capsys, "report", path, "--html", tmp_path / "p.html", "--format", "json")
    assert code == 0
    assert "| json | 1 | 100.0" in out
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    code, _, err = invoke(monkeypatch, capsys, "score", tmp_path / "none.jsonl")
    assert code == 2
    assert "none.jsonl" in err


def test_render_of_text_formats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, capsys, "render", '{"a": 1}', "--format", "json")[0] == 0
    code, out, _ = invoke(monkeypatch, capsys, "render", "{", "--format", "JSON", "--json")
    assert code == 3
    assert json.loads(out)["status"] == "failed"
    assert invoke(monkeypatch, capsys, "render", "x", "--format", "docx")[0] == 1
    assert invoke(monkeypatch, capsys, "render", "nosuch.html", "--format", "html")[0] == 2


def test_tasks_lists_defects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([row("1", "", "JSON", raw_output_metric=["a[*]"])]))
    code, out, _ = invoke(monkeypatch, capsys, "tasks", "--dataset", path, "--json")
    assert code == 0
    assert json.loads(out)["defects"] == [
        {"task_id": "1", "kind": "rule can never match", "seen": "a[*]", "impossible": True}
    ]


def test_numbers_in_the_tables() -> None:
    items = run.score_all(generated(row("1", '{"a": 1}', "JSON"), row("2", "{", "JSON")))
    document = table.document(items)
    assert document["official"] == {"macro4": None, "micro": 0.5}
    (line,) = document["tables"]["format"]
    assert (line["name"], line["items"], line["syntax"]["value"]) == ("json", 2, 0.5)
    json.dumps(document, allow_nan=False)
