"""Every case of ``cases``: a valid one is rendered, an invalid one fails or stays blank. Needs the renderers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.structeval.case_files import load

from trimtab.structeval.formats import FORMATS
from trimtab.structeval.render import Renderer, availability


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer() as one:
        yield one


def skip_unless_available(format_name: str) -> None:
    """Skip with the reason, where what draws the format is not installed."""
    for engine in FORMATS[format_name].needs:
        why = availability.missing(engine)
        if why:
            pytest.skip(f"{format_name}: {why}")


@pytest.mark.parametrize("name", FORMATS)
def test_there_are_at_least_twelve_of_each_kind(name: str) -> None:
    cases = load(name)
    assert sum(case.valid for case in cases) >= 12
    assert sum(not case.valid for case in cases) >= 12


@pytest.mark.parametrize("name", FORMATS)
def test_the_check_agrees_with_the_cases_where_it_decides(name: str) -> None:
    wrong = [case.name for case in load(name) if case.valid and FORMATS[name].check(case.text).ok is False]
    assert not wrong


@pytest.mark.integration
@pytest.mark.parametrize("name", FORMATS)
def test_all_cases(renderer: Renderer, name: str) -> None:
    skip_unless_available(name)
    cases = load(name)
    drawn = list(renderer.render_many([(name, case.text) for case in cases]))
    wrong = [
        f"{case.name}: {one.status} {one.errors}"
        for case, one in zip(cases, drawn, strict=True)
        if (one.status == "rendered") != case.valid or one.status == "unavailable"
    ]
    assert not wrong


SMALL = {
    "HTML": ("<h1>Title</h1>", "Title"),
    "SVG": ("<svg width='90' height='40'><text y='20'>Title</text></svg>", "Title"),
    "Markdown": ("# Title", "Title"),
    "Canvas": ("document.getElementById('c').getContext('2d').fillRect(0, 0, 9, 9)", ""),
    "React": ("export default () => <h1>Title</h1>", "Title"),
    "Vue": ("<template><h1>Title</h1></template>", "Title"),
    "Angular": (
        "import { Component } from '@angular/core';\n"
        "@Component({ selector: 'app-root', template: '<h1>Title</h1>' }) export class AppComponent {}",
        "Title",
    ),
    "Mermaid": ("graph TD; A[Title] --> B", "Title"),
    "LaTeX": (r"\begin{equation} x = 1 \end{equation}", "x = 1"),
    "TikZ": (r"\begin{tikzpicture}\node {Title};\end{tikzpicture}", "Title"),
    "Typst": ("= Title", "Title"),
    "Vega": ('{"title": "Title", "data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {}}', "Title"),
    "Matplotlib": ("import matplotlib.pyplot as plt\nplt.plot([1]); plt.title('Title')", "Title"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_small_text_with_its_visible_words(renderer: Renderer, name: str) -> None:
    skip_unless_available(name)
    text, words = SMALL[name]
    drawn = renderer.render(name, text)
    assert (drawn.status, drawn.errors, drawn.blank) == ("rendered", (), False)
    assert drawn.png is not None and drawn.png.startswith(b"\x89PNG")
    assert words in drawn.text


def test_results_come_in_the_order_of_the_items(renderer: Renderer) -> None:
    skip_unless_available("Vega")
    skip_unless_available("SVG")
    items = [("Vega", SMALL["Vega"][0]), ("SVG", SMALL["SVG"][0]), ("vega-lite", "{"), ("Svg", "<svg/")]
    assert [one.format for one in renderer.render_many(items)] == ["Vega", "SVG", "Vega", "SVG"]


def test_nothing_of_one_page_is_left_for_the_next() -> None:
    skip_unless_available("HTML")
    leave = (
        "<p>x</p><script>localStorage.a = 1; sessionStorage.b = 1; window.left = 1; document.cookie = 'c=1';"
        "document.title = 'left'</script>"
    )
    look = (
        "<p id='p'></p><script>document.getElementById('p').textContent = JSON.stringify([localStorage.a ?? null,"
        "sessionStorage.b ?? null, window.left ?? null, document.cookie])</script>"
    )
    with Renderer(workers=1) as one:
        for _ in range(3):
            assert one.render("HTML", leave).status == "rendered"
        assert one.render("HTML", look).text.strip() == '[null,null,null,""]'


def test_a_missing_renderer_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright")
    pytest.importorskip("PIL")
    monkeypatch.setattr(availability, "find_libraries", lambda: None)
    with Renderer() as one:
        drawn = one.render("React", "export default () => <p>")
    assert drawn.status == "unavailable"
    assert "trimtab doctor --install-renderers" in drawn.errors[0]
