"""Hostile structured output: the text formats parse it in bounded time and memory, or refuse it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.structeval import faithful, run, score
from trimtab.structeval.generations import Generated
from trimtab.structeval.tasks import TEXT_FORMATS, Task


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Every test here: at most 20 s of this process, at most 1.5 GB more memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000


def a_task(output: str, source: str = "", given: str = "text") -> Task:
    return Task("1", "X to Y", f"<code>{source}</code>" if source else "q", given, output, ("a.*.*.*.*.*.*.*.b", "a"))


def scored(output: str, text: str) -> score.Scored:
    return score.score_text(a_task(output), text)


def bomb(levels: int, merge: bool) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}" if merge else "a0: &a0 [x, y]"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{many}]}}" if merge else f"[{many}]"))
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_yaml_alias_bombs_are_refused_by_both_scores(merge: bool) -> None:
    found = scored("yaml", bomb(12, merge))
    assert found.official.render_score == 0.0
    assert found.corrected.score == 0.0
    assert "alias" in (found.corrected.error or "")


def test_a_yaml_document_inside_itself_is_refused() -> None:
    found = scored("yaml", "a: &a\n  b: *a")
    assert found.corrected.score == 0.0
    assert "itself" in (found.corrected.error or "")


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for text in (f"!!python/object/apply:os.system ['touch {mark}']", f"a: !!python/name:os.system\nb: {mark}"):
        assert scored("yaml", text).corrected.score == 0.0
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><a>&x;</a>",
        "<!DOCTYPE a ["
        + "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10 if n else 'ha'}'>" for n in range(12))
        + "]><a>&l11;</a>",
    ],
)
def test_xml_entities_are_refused(text: str) -> None:
    found = scored("xml", text)
    assert found.corrected.score == 0.0
    assert found.official.render_score == 0.0


@pytest.mark.parametrize("output", TEXT_FORMATS)
def test_deep_nesting_and_long_lines(output: str) -> None:
    for text in (
        "[" * 40_000,
        "{" * 40_000,
        "- " * 20_000,
        "<a>" * 20_000,
        "a.b." * 10_000,
        '"' * 60_000,
        "," * 60_000,
    ):
        found = scored(output, text)
        assert found.corrected.score is not None


@pytest.mark.parametrize("output", ["yaml"])
def test_a_hundred_megabytes_are_not_parsed(output: str) -> None:
    found = scored(output, "<|BEGIN_CODE|>" + "a: 1\n" * 20_000_000)
    assert found.official.final_eval_score is None  # not looked at, and said so
    assert "limit" in found.differences[0]
    assert found.corrected.score == 0.0


def test_numbers_and_tables_that_expand() -> None:
    huge = '{"a": ' + "9" * 100_000 + "}"
    assert scored("json", huge).corrected.score == 0.0  # Python's limit on digits of integers
    task = a_task("json", "n,x[999999999]\na,1", "csv")
    assert faithful.compare(task, [{"n": "a"}]).score is not None


def test_hostile_ids_name_no_files(tmp_path: Path) -> None:
    task = Task("../../escape", "Text to HTML", "q", "text", "html", ("a",), (), True)
    (item,) = run.score_all([Generated(task, "")], pictures="render", store=tmp_path / "store")
    assert item.scored.corrected.syntax == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
