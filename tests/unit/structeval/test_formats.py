"""Format names, the checks that run nothing, and the documents that are built around fragments."""

from __future__ import annotations

import pytest

from trimtab.errors import UsageError
from trimtab.structeval.formats import FORMATS, find
from trimtab.structeval.formats.components import page_for
from trimtab.structeval.formats.jobs import CompileJob, PageJob, WorkerJob
from trimtab.structeval.formats.papers import LATEX, TIKZ


def test_the_thirteen_formats() -> None:
    assert len(FORMATS) == 13
    assert all(form.name == name for name, form in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "canonical"), [("Latex", "LaTeX"), ("Tikz", "TikZ"), ("vega-lite", "Vega"), ("ANGULAR", "Angular")]
)
def test_names_in_any_case(name: str, canonical: str) -> None:
    assert find(name).name == canonical


def test_an_unknown_format_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="one of: HTML"):
        find("docx")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["", "  \n\t", "a\0b", "x" * 1_000_001])
def test_what_no_format_accepts(name: str, text: str) -> None:
    checked = FORMATS[name].check(text)
    assert checked.ok is False and checked.error


def test_a_tikz_fragment_gets_a_document_and_its_libraries_move_up() -> None:
    job = TIKZ.plan("\\usetikzlibrary{calendar}\n\\draw (0,0) -- (1,1);")
    assert isinstance(job, WorkerJob)
    before, after = job.text.split("\\begin{document}")
    assert "\\usetikzlibrary{calendar}" in before and "\\usetikzlibrary" not in after
    assert "\\begin{tikzpicture}" in after


def test_a_whole_latex_document_keeps_its_line_numbers() -> None:
    text = "\\documentclass{article}\n\\begin{document}\nx\n\\end{document}"
    job = LATEX.plan(text)
    assert isinstance(job, WorkerJob)
    assert [line.endswith(old) for line, old in zip(job.text.splitlines(), text.splitlines(), strict=True)] == [
        True
    ] * 4


def test_a_vega_specification_with_an_address_is_refused_but_not_a_column_of_that_name() -> None:
    assert find("Vega").check('{"mark": "bar", "data": {"url": "cars.json"}}').ok is False
    assert find("Vega").check('{"mark": "bar", "data": {"values": [{"url": "https://a.b"}]}}').ok is None


def test_code_cannot_end_the_script_element_around_it() -> None:
    page = page_for("react", {"code": "const a = '</script><h1>out</h1>'", "css": "</style><h1>out</h1>", "names": []})
    assert isinstance(page, PageJob)
    assert "</script><h1>" not in page.html and "</style><h1>" not in page.html


def test_a_page_is_taken_as_a_page() -> None:
    assert isinstance(find("React").plan("<!doctype html><p>x</p>"), PageJob)
    assert isinstance(find("React").plan("export default () => <p/>"), CompileJob)
