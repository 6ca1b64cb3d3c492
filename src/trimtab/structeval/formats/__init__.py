"""The thirteen formats that are judged by rendering them. Data formats are in ``structeval.textual``."""

from __future__ import annotations

from trimtab.errors import UsageError
from trimtab.structeval.formats import charts, components, markup, papers
from trimtab.structeval.formats.base import Checked, Format

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        markup.HTML,
        components.REACT,
        components.VUE,
        components.ANGULAR,
        markup.SVG,
        markup.CANVAS,
        papers.LATEX,
        papers.TIKZ,
        markup.MARKDOWN,
        charts.MATPLOTLIB,
        charts.MERMAID,
        papers.TYPST,
        charts.VEGA,
    )
}
_BY_LOWER = {name.lower(): name for name in FORMATS} | dict.fromkeys(
    ("vega-lite", "vegalite", "vega/vega-lite", "vega_lite"), "Vega"
)


def find(name: str) -> Format:
    """By name in any case; the data set writes "Latex" and "Tikz". Raises UsageError."""
    canonical = _BY_LOWER.get(name.strip().lower())
    if canonical is None:
        raise UsageError("no such renderable format", seen=name, fix=f"one of: {', '.join(FORMATS)}")
    return FORMATS[canonical]


__all__ = ["FORMATS", "Checked", "Format", "find"]
