"""Scores, data and values: against recorded scores, published tables, an oracle converter and deliberate damage."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import DataError, UsageError
from trimtab.structeval import aggregate, converter, defects, faithful, score, tasks
from trimtab.structeval.score import Picture
from trimtab.structeval.tasks import Question, Task
from trimtab.structeval.textual import CHECKS


def a_task(output: str = "json", rules: tuple[str, ...] = ("a", "b"), *, source: str = "", given: str = "text") -> Task:
    query = f"Please convert.<code>{source}</code>" if source else "Please output."
    return Task("000500", "Text to X", query, given, output, rules, (), output in tasks.RENDERED_FORMATS)


# --- official ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "generation", "parts"),
    [
        ("json", '{"a": 1}', (1.0, 0.5, 0.6)),
        ("json", '{"a": 1, "b": null}', (1.0, 1.0, 1.0)),
        ("json", "{}", (0.0, 0.0, 0.0)),
        ("json", "oops", (0.0, 0.0, 0.0)),
        ("csv", "oops", (1.0, 0.0, 0.2)),
        ("yaml", "prose", (1.0, 0.0, 0.2)),
        ("json", '{"a": "say \\"hi\\"", "b": 1}', (0.0, 0.0, 0.0)),
        ("csv", "", (1.0, 0.0, 0.2)),
        ("csv", "<|BEGIN_CODE|><|END_CODE|>", (0.0, 0.0, 0.0)),
    ],
)
def test_official_scores(output: str, generation: str, parts: tuple[float, float, float]) -> None:
    found = score.official_text(a_task(output), generation)
    assert (found.render_score, found.key_validation_score, found.final_eval_score) == parts
    assert found.VQA_score is None


def test_rounding_is_pythons_for_each_task() -> None:
    rules = tuple(f"k{n}" for n in range(16))
    found = score.official_text(a_task("json", rules), '{"k0": 1, "k1": 1, "k2": 1}')
    assert found.key_validation_score == 0.1875
    assert found.final_eval_score == round(0.2 + 0.8 * 0.1875, 2) == 0.35
    assert score.official_from_parts(1.0, 1 / 3, 0.5).final_eval_score == round(0.2 + 0.1 / 3 + 0.35, 2)


def test_every_recorded_reference_score_is_reproduced(shared_data: Path) -> None:
    """All columns of every item of the published evaluations; both scores in the time that the project promises."""
    files = sorted((shared_data / "structeval").glob("generations_*/*.evaluation.json"))
    assert files
    for path in files:
        rows = json.loads(path.read_text())
        chosen = [tasks.task_from_row(row, str(path)) for row in rows]
        began = time.process_time()
        found = [score.score_text(task, row["generation"]) for task, row in zip(chosen, rows, strict=True)]
        assert time.process_time() - began < 3 * len(rows) / 950
        for row, one in zip(rows, found, strict=True):
            assert one.official._asdict() == {name: row[name] for name in score.Official._fields}, row["task_id"]


def test_recorded_rollouts_of_another_implementation(shared_data: Path) -> None:
    files = sorted((shared_data / "structeval" / "nemo_gym").glob("*rollouts.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(rows) >= 10
    for row in rows:
        parts = [part for item in row["response"]["output"] if item["type"] == "message" for part in item["content"]]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        task = tasks.task_from_row({**row, "query": ""}, row["task_id"])
        found = score.official_text(task, text) if text.strip() else score.Official(0.0, 0.0, None, 0.0)
        assert found.final_eval_score == row["reward"]
        assert found.key_validation_score == row["key_validation_score"]


# --- corrected --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "generation", "value", "because"),
    [
        ("json", '{"a": "say \\"hi\\"", "b": 1}', 1.0, "decodes escape sequences"),
        ("xml", "<r>1 &lt; 2</r>", 0.2, "replaces &lt;"),
        ("csv", "prose, really", 0.0, "strict parser does not"),
        ("yaml", "just prose", 0.0, "lone str"),
        ("json", '<|BEGIN_CODE|>{"a": 1, "b": 2}<|END_CODE|>\n```\nnot json\n```', 1.0, "prefers a fence"),
        ("json", '<think>hm</think>{"a": 1, "b": 2}', 1.0, "thinking"),
        ("toml", "a = [1, 'x']\nb = 2", 1.0, "another one"),
    ],
)
def test_corrected_scores_and_their_reasons(output: str, generation: str, value: float, because: str) -> None:
    found = score.score_text(a_task(output), generation)
    assert found.corrected.score == pytest.approx(value)
    assert found.corrected.score != found.official.final_eval_score
    assert because in " ".join(found.differences)


def test_decoding_is_a_counted_fallback() -> None:
    found = score.score_text(a_task(), '{\\"a\\": 1,\\n \\"b\\": 2}')
    assert found.corrected.score == 1.0
    assert found.corrected.decoded
    assert found.differences == ()


def test_the_corrected_score_is_not_rounded() -> None:
    found = score.score_text(a_task("json", ("a", "b", "c")), '{"a": 1}')
    assert found.corrected.score == pytest.approx(0.2 + 0.8 / 3, abs=1e-12)
    assert found.official.final_eval_score == 0.47
    assert found.differences == ()


@pytest.mark.parametrize(
    ("picture", "official", "corrected"),
    [
        (Picture("unavailable"), (None, None), (None, None)),
        (Picture("rendered", (), None, None, True), (1.0, None), (1.0, None)),
        (Picture("rendered", (), 0.5, 0.5, True), (1.0, 0.65), (1.0, 0.65)),
        (Picture("rendered", ("judge failed",), None, 0.0, True), (1.0, 0.3), (1.0, None)),
        (Picture("blank", (), 0.0, 0.0, True), (1.0, 0.3), (0.0, 0.1)),
        (Picture("failed", ("Error",), None, None, False), (0.0, 0.1), (0.0, 0.1)),
        (Picture("failed", ("pageerror",), 1.0, 1.0, True), (1.0, 1.0), (0.0, 0.1)),
    ],
)
def test_scores_of_pictures(picture: Picture, official: tuple[Any, Any], corrected: tuple[Any, Any]) -> None:
    found = score.score_picture(a_task("html", ("<b>", "X")), "<B>x</B>", picture)
    assert found.official.key_validation_score == 1.0
    assert (found.official.render_score, found.official.final_eval_score) == official
    assert found.corrected.syntax == corrected[0]
    assert found.corrected.score == (None if corrected[1] is None else pytest.approx(corrected[1]))
    whole = None not in (found.official.final_eval_score, found.corrected.score)
    differs = whole and found.official.final_eval_score != round(found.corrected.score or 0, 2)
    assert bool(found.differences) == (differs or (official[1] is not None and corrected[1] is None))


# --- the data set -----------------------------------------------------------------------------------------------------


def test_the_data_set_and_its_defects(shared_data: Path) -> None:
    chosen = tasks.load(shared_data / "structeval" / "structeval_t_950.jsonl")
    assert len(chosen) == 950
    assert sum(len(task.rules) for task in chosen) == 12_426
    assert {split: sum(task.split == split for task in chosen) for split in tasks.SPLITS[:2]} == {
        "t-gen": 250,
        "t-conv": 700,
    }
    for task in chosen:
        assert tasks.formats_of_id(task.id) == (task.input_format, task.output_format)
    assert defects.counted(defects.find(chosen)) == {
        "literal \\n in the prompt": 700,
        "CSV rule on another format": 75,
        "rule can never match": 25,
        "source is not valid TOML": 19,
        "no closing tag in the prompt": 5,
        "CSV rule without csv::": 1,
        "empty step in a path": 1,
    }


def test_the_prompt_is_the_official_one(shared_data: Path) -> None:
    row = json.loads((shared_data / "structeval" / "nemo_gym" / "example.jsonl").read_text().splitlines()[0])
    task = tasks.load(shared_data / "structeval" / "structeval_t_950.jsonl", names=[row["task_id"]])[0]
    assert task.prompt == row["responses_create_params"]["input"][0]["content"]


def rows(*ids: str) -> list[dict[str, Any]]:
    return [
        {"task_id": one, "query": "q", "task_name": "Text to JSON", "input_type": "Text", "output_type": "JSON",
         "raw_output_metric": ["a"], "VQA": [], "rendering": False}
        for one in ids
    ]  # fmt: skip


def test_loading_filters_and_bad_files(tmp_path: Path) -> None:
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(rows("000500", "000501")))
    lines.write_text("\n".join(map(json.dumps, rows("000500", "000501"))))
    assert [task.id for task in tasks.load(array)] == [task.id for task in tasks.load(lines)] == ["000500", "000501"]
    assert [task.id for task in tasks.load(array, names=["000501"])] == ["000501"]
    assert len(tasks.load(array, splits=["T"], formats=["JSON"], names=["text->json"], limit=1)) == 1
    for filters in ({"splits": ["q"]}, {"formats": ["docx"]}, {"splits": ["v"]}, {"limit": 0}):
        with pytest.raises(UsageError):
            tasks.load(array, **filters)  # type: ignore[arg-type]
    for text in (
        "",
        "[]",
        "{",
        "[1]",
        '{"task_id": "1"}',
        '[{"a": 1}',
        json.dumps([{**rows("1")[0], "output_type": "x"}]),
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(text)
        with pytest.raises(DataError):
            tasks.load(bad)
    with pytest.raises(DataError, match="cannot read"):
        tasks.load(tmp_path / "none.json")


def test_odd_spellings_of_formats() -> None:
    assert [tasks.format_name(name) for name in ("Latex", "TikZ", "Tikz", "Vega-Lite", "YML")] == [
        "latex", "tikz", "tikz", "vega", "yaml",
    ]  # fmt: skip
    assert tasks.formats_of_id("00XX20") == ("text", "")


# --- values -----------------------------------------------------------------------------------------------------------


def conversions(folder: Path) -> Iterator[tuple[Task, Any]]:
    """Every valid conversion task with its data (CSV records unflattened, a single one as an object)."""
    for task in tasks.load(folder / "structeval" / "structeval_t_950.jsonl", splits=["t-conv"]):
        data = converter.parse_source(task.source or "", task.input_format)
        if data is not None:
            yield task, converter.convert(data, task.input_format, "json")


def test_a_lossless_converter_is_faithful_on_every_valid_task(shared_data: Path) -> None:
    scores = []
    for task, data in conversions(shared_data):
        checked = CHECKS[task.output_format](converter.to_text(data, task.output_format))
        assert checked.ok, (task.id, checked.error)
        found = faithful.compare(task, checked.value)
        assert found.score == 1.0, (task.id, found)
        scores.append(found.score)
    assert len(scores) == 681


def test_damage_to_one_value_is_seen_on_every_task(shared_data: Path) -> None:
    draw = random.Random(0)
    seen = {"change": 0, "drop": 0, "rename": 0}
    for number, (task, data) in enumerate(conversions(shared_data)):
        kind = list(seen)[number % 3]
        hurt = damaged(data, kind, draw)
        checked = CHECKS[task.output_format](converter.to_text(hurt, task.output_format))
        if hurt == data or not checked.ok:
            continue
        found = faithful.compare(task, checked.value)
        assert found.score is not None
        assert found.score < 1.0, (kind, task.id)
        seen[kind] += 1
    assert all(count > 150 for count in seen.values()), seen


def damaged(data: Any, kind: str, draw: random.Random) -> Any:
    hurt = copy.deepcopy(data)
    path = draw.choice([path for path, value in leaves(hurt) if value not in (None, "")])
    node = hurt
    for step in path[:-1]:
        node = node[step]
    if kind == "change":
        node[path[-1]] = "something else"
    elif kind == "drop":
        del node[path[-1]]
    elif isinstance(path[-1], str):
        node["another_name"] = node.pop(path[-1])
    return hurt


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path, node


@pytest.mark.parametrize(
    ("given", "source", "output", "answer", "whole"),
    [
        ("json", '{"a": 1}', "yaml", "a: 1.0", True),
        ("json", '{"a": 1}', "yaml", "a: '1'", False),
        ("json", '{"a": "1"}', "yaml", "a: 1", False),
        ("json", '{"a": true}', "yaml", "a: 'true'", False),
        ("json", '{"a": "2024-01-01"}', "yaml", "a: 2024-01-01", False),
        ("json", '{"a": "no"}', "yaml", "a: no", False),
        ("json", '{"a": [1, 2]}', "yaml", "a: [2, 1]", False),
        ("json", '{"a": 1, "b": 2}', "yaml", "b: 2\na: 1", True),
        ("json", '{"a": []}', "yaml", "a: {}", False),
        ("json", '{"a": null}', "yaml", "b: 1", False),
        ("toml", "a = 2024-01-01T00:00:00Z", "json", '{"a": "2024-01-01T00:00:00+00:00"}', True),
        ("toml", "a = 2024-01-01T00:00:00Z", "json", '{"a": "2024-01-02"}', False),
        ("xml", "<r><t><x>1</x></t></r>", "json", '{"r": {"t": [{"x": 1}]}}', True),
        ("xml", "<r><t x='1'>v</t></r>", "json", '{"r": {"t": {"@x": "1", "#text": "v"}}}', True),
        ("xml", "<r><t x='1'>v</t></r>", "json", '{"r": {"t": {"x": 1, "value": "v"}}}', True),
        ("xml", "<r><t>007</t></r>", "json", '{"r": {"t": 7}}', False),
        ("csv", "a.b,a.c\n1,x", "json", '{"a": {"b": 1, "c": "x"}}', True),
        ("csv", "n,v\nx,1\ny,2", "json", '[{"n": "x", "v": 2}, {"n": "y", "v": 1}]', False),
        ("csv", "n,t\nx,a;b", "json", '[{"n": "x", "t": ["a", "b"]}]', True),
        ("csv", "n,t\nx,\ny,1", "json", '[{"n": "x"}, {"n": "y", "t": 1}]', True),
        ("json", '[{"n": "x", "t": [1, 2]}]', "csv", "n,t\nx,1;2", True),
        ("json", '{"p": [{"n": "x"}, {"n": "y"}]}', "xml", "<p><item><n>x</n></item><item><n>y</n></item></p>", True),
        ("json", '{"p": [{"n": "x"}, {"n": "y"}]}', "xml", "<p><item><n>y</n></item><item><n>x</n></item></p>", False),
        ("json", '{"a": 1}', "xml", "<r><a>1</a><b>2</b></r>", False),
    ],
)
def test_what_counts_as_the_same_data(given: str, source: str, output: str, answer: str, whole: bool) -> None:
    task = a_task(output, ("a",), source=source, given=given)
    found = faithful.compare(task, CHECKS[output](answer).value)
    assert found.score is not None
    assert (found.score == 1.0) is whole, found


def test_faithful_where_there_is_nothing_to_compare() -> None:
    assert faithful.compare(a_task(), {"a": 1}).score is None
    broken = a_task("json", source="a = ", given="toml")
    assert faithful.compare(broken, {"a": 1}).score is None
    assert faithful.compare(a_task("json", source="a: 1", given="yaml"), None).score == 0.0


def test_ceilings_of_a_lossless_converter(shared_data: Path) -> None:
    """Specification, section 7: literal and best convention, in percent."""
    published = {
        "JSON to YAML": (100, 100), "YAML to JSON": (100, 100), "JSON to CSV": (100, 100), "YAML to CSV": (100, 100),
        "XML to CSV": (99.8, 99.8), "TOML to JSON": (99.4, 99.4), "TOML to YAML": (96.3, 96.3),
        "CSV to YAML": (69.4, 92.8), "CSV to JSON": (53.6, 80.3), "YAML to XML": (48.8, 48.8),
        "XML to JSON": (37.5, 93.2),
        "XML to YAML": (36.5, 95.8), "CSV to XML": (32.9, 32.9), "JSON to XML": (71.5, 71.5),
    }  # fmt: skip
    path = shared_data / "structeval" / "structeval_t_950.jsonl"
    found = aggregate.ceiling(tasks.load(path, splits=["t-conv"]))
    assert found.keys() == published.keys()
    for name, (literal, best, _) in found.items():
        assert 100 * literal == pytest.approx(published[name][0], abs=0.5), name
        assert 100 * best == pytest.approx(published[name][1], abs=0.5), name


# --- aggregates -------------------------------------------------------------------------------------------------------


def test_macro_and_micro_averages() -> None:
    def mark(split: str, name: str, value: float | None) -> aggregate.Mark:
        given, output = ("text" if split.endswith("gen") else "html"), ("html" if split[0] == "v" else "json")
        return aggregate.Mark(Task("1", name, "", given, output, (), (), split[0] == "v"), value, value, 1.0, None)

    marks = [mark("t-gen", "a", 1.0), mark("t-gen", "a", 0.0), mark("t-gen", "b", 1.0), mark("t-conv", "c", 0.5),
             mark("v-gen", "d", 0.25), mark("v-conv", "e", 0.75), mark("v-conv", "e", None)]  # fmt: skip
    found = aggregate.overall(marks, lambda one: one.official)
    assert found.macro4 == pytest.approx((0.75 + 0.5 + 0.25 + 0.75) / 4)
    assert found.micro == pytest.approx(3.5 / 6)
    assert aggregate.overall(marks[:3], lambda one: one.official).macro4 is None


def test_the_papers_average_from_its_cells() -> None:
    """Llama-3.1-8B-Instruct, Tables 8, 11 and 12 of the paper: the two T cells of Table 6."""
    generation = [78.82, 81.68, 6.76, 59.38, 74.44]
    conversion = [34.14, 95.96, 68.62, 56.02, 94.00, 92.52, 98.98, 20.20, 86.96, 39.90, 88.32, 86.90, 49.54, 85.62]
    assert aggregate.macro4_of_cells({"t-gen": generation}) == pytest.approx(60.22, abs=0.005)
    assert aggregate.macro4_of_cells({"t-conv": conversion}) == pytest.approx(71.26, abs=0.005)
    cells = {"t-gen": [60.22], "t-conv": [71.26], "v-gen": [54.44], "v-conv": [61.15]}
    assert aggregate.macro4_of_cells(cells) == pytest.approx(61.77, abs=0.005)


def test_intervals() -> None:
    from trimtab.comparison.statistics import wilson_interval

    for events, trials in ((0, 10), (3, 10), (10, 10), (412, 950)):
        found = aggregate.share([True] * events + [False] * (trials - events))
        assert (found.low, found.high) == pytest.approx(wilson_interval(events, trials), abs=1e-9)
    values = [random.Random(1).random() for _ in range(400)]
    found = aggregate.mean(values)
    half = 1.96 * (sum((v - sum(values) / 400) ** 2 for v in values) / 399) ** 0.5 / 20
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert aggregate.mean([]).value is None
    assert aggregate.mean([0.5]) == (0.5, 0.5, 0.5, 1)


def test_questions_are_read() -> None:
    row = {**rows("000400")[0], "output_type": "HTML", "rendering": True, "VQA": [{"question": "q?", "answer": "a"}]}
    assert tasks.task_from_row(row, "").questions == (Question("q?", "a"),)
