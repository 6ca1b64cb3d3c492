"""The rendered tasks that come with the benchmarks: five of each format, without a defect that we look for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trimtab.structeval import defects, tasks

FILE = Path(__file__).parents[3] / "benchmarks" / "structeval" / "v_tasks.jsonl"


def test_five_tasks_of_each_rendered_format() -> None:
    chosen = tasks.load(FILE)
    assert Counter(task.output_format for task in chosen) == dict.fromkeys(tasks.RENDERED_FORMATS, 5)
    assert {task.split for task in chosen} == {"v-gen", "v-conv"}
    assert all(tasks.formats_of_id(task.id) == (task.input_format, task.output_format) for task in chosen)
    assert all(task.rendered for task in chosen)


def test_they_have_no_defects() -> None:
    assert defects.find(tasks.load(FILE)) == []


def test_each_can_be_scored_in_all_three_parts() -> None:
    for task in tasks.load(FILE):
        assert len(task.rules) >= 3 and len(task.questions) >= 3, task.id
        assert len(set(task.rules)) == len(task.rules), task.id
        assert (task.source is not None) == (task.split == "v-conv"), task.id
        assert "BEGIN_CODE" in task.prompt
