"""Comparisons as one self-contained HTML page.

Covered: the page's data, escaping, content security policy. Not covered: layout (``templates/``) and wording.

Safety of the page: the template engine escapes everything; texts from models first lose unseen characters; style and
script are ours and are allowed by their hash alone, so nothing that slipped through could run or load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trimtab.comparison.differences import Difference
from trimtab.comparison.results import AxisResult, Comparison, Finding, worst
from trimtab.reports import charts, wording
from trimtab.reports.document import changed_items, check_comparisons, shown_differences
from trimtab.reports.text import clip, moment, short_name, visible

_WHOLE, _LEAD, _MOST = 700, 520, 20_000
_MOST_DIFFERENCES = 60
_DARK = {
    "ink": "#e7ecf2",
    "muted": "#a5b0bf",
    "line": "#303a47",
    "bad": "#ff8f85",
    "unsure": "#f0b849",
    "good": "#5fcac1",
}
_SIGNS = {"pass": "✓", "regression": "✕", "unmeasured": "–", "not enough evidence": "?"}
_SLUGS = {"pass": "pass", "regression": "regression", "unmeasured": "unmeasured", "not enough evidence": "unsure"}
_DIRECTIONS = {"worse": "Got worse", "better": "Got better", "unscored": "Lost its score", "same": "Unchanged"}


class Passage(NamedTuple):
    """A text split for reading: what is shown, what unfolds, and how much was cut from the end."""

    lead: str
    rest: str
    length: int
    cut: int


def to_html(comparisons: Sequence[Comparison], *, title: str, redact: bool = False) -> str:
    """One HTML page, without external loads, for one or more candidates against one base.

    Args:
        comparisons: one or more, all with the same base.
        title: heading and window title; any text.
        redact: hide prompts and answers of items; ids, categories and verdicts stay.

    Raises:
        UsageError: for no comparison, or comparisons with different bases.
    """
    many = check_comparisons(comparisons)
    style, script = _asset("report.css") + _palette_rules(), _asset("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=" ".join(visible(title).split()),
            csp=_policy(style, script),
            style=Markup(style),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            redacted=redact,
            comparisons=many,
            base=many[0].base,
            policy=many[0].policy,
            headline=wording.overall_headline(many),
            verdict=worst([one.verdict for one in many]),
            axes=[_axis_view(many, axis) for axis in many[0].axes],
            tradeoff=charts.tradeoff_chart(many),
            tradeoff_narrow=charts.tradeoff_chart(many, (250, 230)),
            tradeoff_axes=charts.tradeoff_axes(many),
            findings=[(one, finding, _settings_view(finding, redact)) for one in many for finding in one.findings],
            fingerprints=_fingerprint_rows(many),
            **_item_views(many, redact),
        )
    )


def _axis_view(comparisons: Sequence[Comparison], axis: AxisResult) -> dict[str, Any]:
    """One axis over all candidates: what the template needs, already in words."""
    results = [next(one for one in comparison.axes if one.name == axis.name) for comparison in comparisons]
    measured = next((one for one in results if one.estimate is not None), None)
    reference = None if measured is None or measured.estimate is None else measured.estimate.base
    return {
        "axis": axis,
        "label": wording.axis_label(axis),
        "reference": None if reference is None else wording.value_text(axis, reference),
        "results": list(zip(comparisons, results, strict=True)),
        "changed": any(result.transitions for result in results),
        "changes": [(one, wording.changes(result)) for one, result in zip(comparisons, results, strict=True)],
        "chart": charts.axis_chart(comparisons, axis.name),
    }


class Settings(NamedTuple):
    """A changed setting for the page: rows of (place, before, after), how many more there are, whether texts show."""

    rows: tuple[Difference, ...]
    more: int
    texts: bool


def _settings_view(finding: Finding, redact: bool) -> Settings:
    shown = shown_differences(finding, redact)
    texts = any(one.base is not None or one.candidate is not None for one in shown)
    return Settings(shown[:_MOST_DIFFERENCES], max(0, len(shown) - _MOST_DIFFERENCES), texts)


def _fingerprint_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """One row a key: (value, whether it differs from the reference's) for the reference and each candidate."""
    prints = [comparisons[0].base.fingerprint, *(one.candidate.fingerprint for one in comparisons)]
    keys = sorted({key for found in prints for key in found})
    return [
        (
            key,
            [
                (found.get(key, ""), place > 0 and found.get(key) != prints[0].get(key))
                for place, found in enumerate(prints)
            ],
        )
        for key in keys
    ]


def _item_views(comparisons: Sequence[Comparison], redact: bool) -> dict[str, Any]:
    """Changed items with numbered filters, so that no text from a data set is ever compared by the script."""
    items = changed_items(comparisons, redact=redact)
    labels = {axis.name: wording.axis_label(axis) for axis in comparisons[0].axes}
    axes = [name for name in labels if any(item["axis"] == name for item in items)]
    categories = sorted({item["category"] for item in items if item["category"]})
    directions = [
        one
        for one in _DIRECTIONS
        if any(side and side["direction"] == one for item in items for side in item["candidates"])
    ]
    for item in items:
        item["axis_label"] = labels[item["axis"]]
        item["axis_key"] = axes.index(item["axis"])
        item["category_key"] = categories.index(item["category"]) if item["category"] else ""
        item["direction_keys"] = " ".join(sorted({side["direction"] for side in item["candidates"] if side}))
    return {
        "items": items,
        "filter_axes": [labels[name] for name in axes],
        "filter_categories": categories,
        "filter_directions": [(one, _DIRECTIONS[one]) for one in directions if one != "same"],
    }


def _passage(text: str | None) -> Passage | None:
    """Long answers fold, endless ones are cut; None stays None."""
    if text is None:
        return None
    shown = visible(text[:_MOST])
    cut = max(0, len(text) - _MOST)
    if len(shown) <= _WHOLE and not cut:
        return Passage(shown, "", len(text), 0)
    return Passage(shown[:_LEAD], shown[_LEAD:], len(text), cut)


def _line(text: str, limit: int = 160) -> str:
    return clip(" ".join(visible(text).split()), limit)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trimtab.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        line=_line,
        moment=moment,
        passage=_passage,
        short=short_name,
        sign=_SIGNS.__getitem__,
        slug=_SLUGS.__getitem__,
        verdict_label=wording.VERDICT_LABELS.__getitem__,
        direction_label=_DIRECTIONS.__getitem__,
    )
    environment.globals.update(words=wording)
    return environment


def _asset(name: str) -> str:
    return resources.files("trimtab.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _palette_rules() -> str:
    """Map the charts' fixed colours to the page's, for both themes."""
    light = "".join(f"--chart-{name}:{colour};" for name, colour in charts.PALETTE.items())
    dark = "".join(f"--chart-{name}:{colour};" for name, colour in _DARK.items())
    mapped = "".join(
        f'.chart [{how}="{colour}"]{{{how}:var(--chart-{name})}}'
        for name, colour in charts.PALETTE.items()
        for how in ("fill", "stroke")
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{mapped}"


def _policy(style: str, *scripts: str) -> str:
    """Nothing loads, nothing submits, nothing frames; only our own style and scripts apply."""
    allowed = " ".join(f"'{_digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
