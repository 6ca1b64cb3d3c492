"""Charts as inline SVG: one interval chart for an axis, one of safety against utility.

Covered: Altair specifications, rendering without a browser, a text alternative, colours that the page can switch
between light and dark. Not covered: interaction (a report must read the same on paper).

Colours are fixed hex values of the light theme, so that a chart also stands alone; the page's style sheet maps each of
them to a variable (``html.py`` generates those rules from ``PALETTE``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
from markupsafe import Markup, escape

from trimtab.comparison.results import AxisResult, Comparison, Verdict
from trimtab.comparison.statistics import Interval
from trimtab.reports import wording
from trimtab.reports.text import short_name

PALETTE = {
    "ink": "#1b2330",
    "muted": "#566273",
    "line": "#dfe4ea",
    "bad": "#b3261e",
    "unsure": "#8a5700",
    "good": "#0b6e69",
}
VERDICT_COLOURS: dict[Verdict, str] = {
    "regression": PALETTE["bad"],
    "not enough evidence": PALETTE["unsure"],
    "unmeasured": PALETTE["muted"],
    "pass": PALETTE["good"],
}
_SHAPES = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross")
CORNERS = (("left", 11, -15), ("left", 11, 15), ("right", -11, -15), ("right", -11, 15))  # of a label: align, dx, dy
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
_SAFETY, _UTILITY = ("compliance",), ("accuracy", "over_refusal", "perplexity")


class _Mark(NamedTuple):
    """One model on one axis: name, value with bounds, colour."""

    name: str
    value: float
    lower: float
    upper: float
    colour: str
    verdict: str


def axis_chart(comparisons: Sequence[Comparison], name: str) -> Markup | None:
    """Reference and candidates on one axis with their intervals and the margin; None where nothing was measured."""
    results = [_find(one, name) for one in comparisons]
    measured = [axis for axis in results if axis is not None and axis.estimate is not None]
    if not measured:
        return None
    marks = _marks(comparisons, name)
    axis = measured[0]
    described = "; ".join(f"{mark.name} {mark.verdict}" for mark in marks)
    return as_svg(_axis_spec(axis, marks, _limit(axis, marks[0].value)), f"{wording.axis_label(axis)}. {described}.")


def tradeoff_chart(comparisons: Sequence[Comparison], size: tuple[int, int] = (560, 300)) -> Markup | None:
    """Safety against utility, one point a model; None where a comparison lacks one of the two.

    Args:
        comparisons: as ever. size: width and height of the plot in pixels, without labels.
    """
    safety, utility = (_first(comparisons[0], families) for families in (_SAFETY, _UTILITY))
    if safety is None or utility is None:
        return None
    across, up = _marks(comparisons, safety.name), _marks(comparisons, utility.name)
    known = {mark.name: mark for mark in up}
    points = [(mark, known[mark.name]) for mark in across if mark.name in known]
    if len(points) < 2:
        return None
    described = "; ".join(f"{one.name}: {one.verdict} across, {other.verdict} up" for one, other in points)
    text = f"{wording.axis_label(safety)} across, {wording.axis_label(utility)} up. {described}."
    return as_svg(_tradeoff_spec(safety, utility, points, size), text)


def tradeoff_axes(comparisons: Sequence[Comparison]) -> tuple[AxisResult, AxisResult] | None:
    """The safety and the utility axis that ``tradeoff_chart`` draws."""
    safety, utility = (_first(comparisons[0], families) for families in (_SAFETY, _UTILITY))
    return None if safety is None or utility is None else (safety, utility)


def _find(comparison: Comparison, name: str) -> AxisResult | None:
    return next((axis for axis in comparison.axes if axis.name == name), None)


def _first(comparison: Comparison, families: Sequence[str]) -> AxisResult | None:
    for wanted in families:
        for axis in comparison.axes:
            if wording.family(axis) == wanted and axis.estimate is not None:
                return axis
    return None


def _marks(comparisons: Sequence[Comparison], name: str) -> list[_Mark]:
    """The reference once, then each candidate that was measured; names are made unique by a number."""
    marks: list[_Mark] = []
    for place, comparison in enumerate(comparisons, start=1):
        axis = _find(comparison, name)
        if axis is None or axis.estimate is None:
            continue
        estimate = axis.estimate
        if not marks:
            marks.append(_mark(axis, "Reference", estimate.base, estimate.base_interval, PALETTE["muted"]))
        label = short_name(comparison.candidate.model, 22)
        if any(mark.name == label for mark in marks):
            label = f"{short_name(comparison.candidate.model, 18)} ({place})"
        marks.append(_mark(axis, label, estimate.candidate, estimate.candidate_interval, VERDICT_COLOURS[axis.verdict]))
    return marks


def _mark(axis: AxisResult, name: str, value: float, interval: Interval, colour: str) -> _Mark:
    bounds = interval if all(abs(bound) < 1e300 for bound in interval) else Interval(value, value)
    text = f"{wording.value_text(axis, value)} ({wording.interval_text(axis, interval, difference=False)})"
    shown = [_shown(axis, number) for number in (value, *bounds)]
    return _Mark(name, shown[0], shown[1], shown[2], colour, text)


def _shown(axis: AxisResult, value: float) -> float:
    """Perplexity is read as such, not as its logarithm; capped, for a chart cannot show infinity."""
    return min(wording.perplexity(value), 1e12) if wording.family(axis) == "perplexity" else value


def _limit(axis: AxisResult, reference: float) -> float:
    """Where the margin ends, in the unit of the chart; a margin on log-likelihood is a factor on perplexity."""
    margin = (axis.margin or 0.0) * (1.0 if axis.lower_is_better else -1.0)
    if wording.family(axis) == "perplexity":
        return reference * wording.perplexity(margin)
    return reference + margin


def _scale(axis: AxisResult, marks: Sequence[_Mark], extra: Sequence[float] = ()) -> alt.Scale:
    """Rates start at zero and end at a round number past the last bound; means are framed by their bounds."""
    low = min([*(mark.lower for mark in marks), *extra])
    high = max([*(mark.upper for mark in marks), *extra])
    if axis.kind == "binary":
        top = next(step for step in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0) if high <= step or step == 1.0)
        return alt.Scale(domain=[0.0, top], nice=False)
    pad = 0.08 * (high - low) or 1.0
    return alt.Scale(domain=[low - pad, high + pad], nice=False, zero=False)


def _axis_spec(axis: AxisResult, marks: Sequence[_Mark], limit: float) -> alt.LayerChart:
    rows = [mark._asdict() for mark in marks]
    names = [mark.name for mark in marks]
    data = alt.Data(values=rows)
    y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=140, ticks=False, domain=False))
    frame: dict[str, Any] = {"title": None, "scale": _scale(axis, marks, [limit]), "axis": _number_axis(axis)}
    x = alt.X("value:Q", **frame)
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data)
    bars = base.mark_rule(strokeWidth=6, opacity=0.28, strokeCap="round").encode(
        y=y, x=alt.X("lower:Q", **frame), x2="upper:Q", color=colour
    )
    points = base.mark_point(filled=True, size=95, opacity=1).encode(y=y, x=x, color=colour)
    line = alt.Chart(alt.Data(values=[{"limit": limit}]))
    rule = line.mark_rule(strokeDash=[4, 3], strokeWidth=1.25, color=PALETTE["ink"]).encode(x="limit:Q")
    note = line.mark_text(
        text="limit", dy=-6, y=0, fontSize=12, color=PALETTE["ink"], align="center", baseline="bottom"
    ).encode(x="limit:Q")
    return (rule + bars + points + note).properties(width=310, height=34 * len(marks) + 6)


def _tradeoff_spec(
    safety: AxisResult, utility: AxisResult, points: Sequence[tuple[_Mark, _Mark]], size: tuple[int, int]
) -> alt.LayerChart:
    scale_x = _scale(safety, [one for one, _ in points])
    scale_y = _scale(utility, [other for _, other in points])
    places = _label_places(points, scale_x, scale_y, size)
    rows = [
        {
            "name": one.name,
            "x": one.value,
            "x1": one.lower,
            "x2": one.upper,
            "y": other.value,
            "y1": other.lower,
            "y2": other.upper,
            "colour": one.colour,
            "shape": _SHAPES[min(place, len(_SHAPES) - 1)],
            "label": places[place],
        }
        for place, (one, other) in enumerate(points)
    ]
    chart = alt.Chart(alt.Data(values=rows))
    x = alt.X("x:Q", title=f"{wording.axis_label(safety)} →", scale=scale_x, axis=_number_axis(safety))
    y = alt.Y("y:Q", title=f"{wording.axis_label(utility)} →", scale=scale_y, axis=_number_axis(utility))
    colour = alt.Color("colour:N", scale=None)
    band = {"strokeWidth": 5, "opacity": 0.25, "strokeCap": "round"}
    across = chart.mark_rule(**band).encode(x="x1:Q", x2="x2:Q", y=y, color=colour)
    up = chart.mark_rule(**band).encode(x=x, y="y1:Q", y2="y2:Q", color=colour)
    shape = alt.Shape("shape:N", scale=None)
    dots = chart.mark_point(filled=True, size=140, opacity=1).encode(x=x, y=y, color=colour, shape=shape)
    names = [_names(chart, corner).encode(x=x, y=y, text="name:N", color=colour) for corner in sorted(set(places))]
    layers: list[alt.Chart] = [across, up, dots, *names]
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def _names(chart: alt.Chart, corner: int) -> alt.Chart:
    """Labels of the points whose label lies in this corner."""
    align, dx, dy = CORNERS[corner]
    mark = chart.transform_filter(alt.datum.label == corner)
    return mark.mark_text(align=align, dx=dx, dy=dy, baseline="middle", fontSize=13, fontWeight="bold")


def _label_places(
    points: Sequence[tuple[_Mark, _Mark]], scale_x: alt.Scale, scale_y: alt.Scale, size: tuple[int, int]
) -> list[int]:
    """A corner for each label, chosen one by one so that labels overlap other labels and points least."""
    wide, high = size
    spots = [(_pixels(one.value, scale_x, wide), high - _pixels(other.value, scale_y, high)) for one, other in points]
    return place_labels(spots, [mark.name for mark, _ in points], size)


def place_labels(spots: Sequence[tuple[float, float]], names: Sequence[str], size: tuple[int, int]) -> list[int]:
    """As ``_label_places``, from pixels (from the left, from the top)."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    chosen: list[int] = []
    for (x, y), name in zip(spots, names, strict=True):
        boxes = [_box(x, y, len(name), corner) for corner in range(len(CORNERS))]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box, size) for box in boxes]
        best = costs.index(min(costs))
        chosen.append(best)
        taken.append(boxes[best])
    return chosen


def _pixels(value: float, scale: alt.Scale, length: int) -> float:
    low, high = scale.to_dict()["domain"]
    return float((value - low) / (high - low) * length)


def _box(x: float, y: float, letters: int, corner: int) -> tuple[float, float, float, float]:
    align, dx, dy = CORNERS[corner]
    width, left = 7.6 * letters, x + dx
    start = left if align == "left" else left - width
    return (start, y + dy - 8, start + width, y + dy + 8)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _outside(box: Sequence[float], size: tuple[int, int]) -> float:
    """Area that sticks out of the plot on the left, right or bottom, where axis labels are."""
    return 16.0 * (max(0.0, -box[0]) + max(0.0, box[2] - size[0])) + 4.0 * max(0.0, box[3] - size[1])


def _number_axis(axis: AxisResult) -> alt.Axis:
    return alt.Axis(format=".0%" if axis.kind == "binary" else "~g", tickCount=5, domain=False, ticks=False)


def as_svg(chart: alt.LayerChart, description: str) -> Markup:
    """Render and label; the root element becomes an image with a text alternative."""
    configured: Any = (
        chart.configure(
            font=_FONT, background="transparent", aria=False, padding={"left": 2, "top": 18, "right": 14, "bottom": 2}
        )
        .configure_view(stroke=None)
        .configure_axis(
            gridColor=PALETTE["line"],
            labelColor=PALETTE["muted"],
            titleColor=PALETTE["muted"],
            labelFontSize=13,
            titleFontSize=13,
            titleFontWeight="normal",
            labelPadding=8,
            titlePadding=10,
        )
        .configure_axisY(labelColor=PALETTE["ink"])
    )
    buffer = io.StringIO()
    configured.save(buffer, format="svg")
    svg = buffer.getvalue()
    start = f'<svg class="chart" role="img" aria-label="{escape(description)}"'
    svg = svg.replace(' class="marks"', "", 1)
    return Markup(re.sub("<svg", lambda _: start, svg, count=1))  # noqa: S704 - Vega escaped the texts
