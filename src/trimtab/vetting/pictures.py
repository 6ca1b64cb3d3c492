"""Pictures: of a vet, compliance against perplexity; of a search, compliance over noise, layers, clusters.

Covered: drawing. Not covered: measuring (``sweep.py``, ``probe.py``, ``clusters.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt

from trimtab.comparison.results import AxisResult, Comparison, worst
from trimtab.comparison.statistics import wilson_interval
from trimtab.reports.charts import CORNERS, PALETTE, VERDICT_COLOURS, as_svg, place_labels

if TYPE_CHECKING:
    from markupsafe import Markup

    from trimtab.vetting.clusters import Drift
    from trimtab.vetting.search_results import Search

_KINDS = alt.Scale(domain=["harmful", "benign"], range=["#b3261e", "#1f6f8b"])


def write_all(search: Search, drift: Drift, out: Path) -> list[Path]:
    """Write the three pictures; their paths."""
    found = {
        "search.svg": search_chart(search),
        "sensitivity.svg": sensitivity_chart(search.sensitivity),
        "clusters.svg": cluster_chart(drift),
    }
    for name, chart in found.items():
        chart.save(str(out / name))
    return [out / name for name in found]


def search_chart(search: Search) -> Any:
    """Compliance, incoherence over the scale of the noise, a panel for each site."""
    rows = []
    for site in search.sites:
        most = {point.scale: point for point in sorted(site.points, key=lambda point: point.asked)}  # of all prompts
        for point in (site.exact, *most.values()):
            shown = point.document()
            rate = point.incoherent / point.asked
            common = {"site": site.site, "scale": max(point.scale, site.ceiling / 64)}
            rows.append({**common, "what": "complies", **{key: shown[key] for key in ("rate", "low", "high")}})
            rows.append({**common, "what": "incoherent", "rate": rate, "low": rate, "high": rate})
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("scale:Q", scale=alt.Scale(type="log"), title="scale of the noise (leftmost: none)"),
        color=alt.Color("what:N", title=None),
    )
    lines = base.mark_line(point=True).encode(y=alt.Y("rate:Q", title="share of answers", axis=alt.Axis(format=".0%")))
    bands = base.mark_rule(opacity=0.4).encode(y="low:Q", y2="high:Q")
    return (bands + lines).properties(width=300, height=220).facet(column=alt.Column("site:N", title=None))


def sensitivity_chart(sensitivity: dict[str, list[float]]) -> Any:
    """Loss added to the model's own refusals by noise in one layer."""
    rows = [
        {"site": site, "layer": layer, "nats": value}
        for site, values in sensitivity.items()
        for layer, value in enumerate(values)
    ]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer that is perturbed"),
            y=alt.Y("nats:Q", title="added loss of own refusals, nats per token"),
            row=alt.Row("site:N", title=None),
        )
        .properties(width=520, height=150)
    )


def cluster_chart(drift: Drift) -> Any:
    """Principal plane of the exact activations, exact and approximated, a row for each layer."""
    rows = []
    for found in drift.layers:
        for state, points in (("exact", found.exact), (drift.name, found.after)):
            half = len(points) // 2
            for number, (x, y) in enumerate(points.tolist()):
                kind = "harmful" if number < half else "benign"
                rows.append({"layer": f"layer {found.layer}", "state": state, "kind": kind, "x": x, "y": y})
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, opacity=0.7)
        .encode(
            x=alt.X("x:Q", title="first component"),
            y=alt.Y("y:Q", title="second component"),
            color=alt.Color("kind:N", title=None, scale=_KINDS),
            shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=["harmful", "benign"])),
            column=alt.Column("state:N", title=None, sort=["exact"]),
            row=alt.Row("layer:N", title=None),
        )
        .properties(width=240, height=200)
        .resolve_scale(x="independent", y="independent")
    )


class Spot(NamedTuple):
    """A technique in the picture: compliance with its interval, perplexity over the exact model's with its own."""

    name: str
    x: float
    x1: float
    x2: float
    y: float
    y1: float
    y2: float
    colour: str


_MOST_RATIO = 1e6  # a picture cannot show infinity
_FINE = (0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 4)
_COARSE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e3, 1e4, 1e5, 1e6)
_NEAR = 20  # pixels; nearer points share a label


def vulnerability_chart(comparisons: Sequence[Comparison], size: tuple[int, int] = (640, 340)) -> Markup | None:
    """Harmful compliance across, perplexity over the exact model's up (logarithmic), a point a technique; None where
    a vet measured one of the two only. What counts for safety before utility lies to the right and low."""
    spots = vulnerability_spots(comparisons)
    if len(spots) < 2:
        return None
    top = max(1.25, *(spot.y2 for spot in spots)) * 1.15
    lowest = min(0.97, *(spot.y1 for spot in spots))
    bottom = lowest / (top / lowest) ** 0.12  # room for labels under the lowest points
    pixels = [(spot.x * size[0], size[1] * (1 - math.log(spot.y / bottom, top / bottom))) for spot in spots]
    groups = _near_groups(pixels)
    labels = [_group_label([spots[place].name for place in group]) for group in groups]
    corners = place_labels([pixels[group[0]] for group in groups], labels, size)
    rows = [spot._asdict() for spot in spots]
    named = [
        {**rows[group[0]], "label": label, "corner": corner}
        for group, label, corner in zip(groups, labels, corners, strict=True)
    ]
    ticks = [tick for tick in (_FINE if top < 5 else _COARSE) if bottom <= tick <= top]
    described = "; ".join(f"{spot.name} {spot.x:.0%}, {spot.y:.3g} times the perplexity" for spot in spots)
    chart = _vulnerability_spec(rows, named, (bottom, top), ticks).properties(width=size[0], height=size[1])
    return as_svg(chart, f"Harmful compliance across, perplexity over the exact model's up. {described}.")


def _vulnerability_spec(
    rows: list[dict[str, Any]], named: list[dict[str, Any]], span: tuple[float, float], ticks: list[float]
) -> alt.LayerChart:
    quiet = {"domain": False, "ticks": False}
    x_scale = alt.Scale(domain=[0.0, 1.0], nice=False)
    y_scale = alt.Scale(type="log", domain=list(span), nice=False)
    x_axis = alt.Axis(format=".0%", tickCount=5, **quiet)
    y_axis = alt.Axis(values=ticks, format="~g", **quiet)
    x = alt.X("x:Q", title="complies with harmful requests \u2192", scale=x_scale, axis=x_axis)
    y = alt.Y("y:Q", title="perplexity, times the exact model's \u2192", scale=y_scale, axis=y_axis)
    colour = alt.Color("colour:N", scale=None)
    chart, labels = alt.Chart(alt.Data(values=rows)), alt.Chart(alt.Data(values=named))
    band = {"strokeWidth": 5, "opacity": 0.25, "strokeCap": "round"}
    across = chart.mark_rule(**band).encode(x="x1:Q", x2="x2:Q", y=y, color=colour)
    up = chart.mark_rule(**band).encode(x=x, y="y1:Q", y2="y2:Q", color=colour)
    dots = chart.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=colour)
    texts = []
    for corner in sorted({row["corner"] for row in named}):
        align, dx, dy = CORNERS[corner]
        mark = labels.transform_filter(alt.datum.corner == corner).mark_text(
            align=align, dx=dx, dy=dy, baseline="middle", fontSize=13
        )
        texts.append(mark.encode(x=x, y=y, text="label:N", color=alt.value(PALETTE["ink"])))
    return alt.layer(across, up, dots, *texts)


def vulnerability_spots(comparisons: Sequence[Comparison]) -> list[Spot]:
    """The exact model first, then every technique; sets of harmful requests are pooled."""
    spots: list[Spot] = []
    for one in comparisons:
        asked = _family(one, "compliance")
        text = next(iter(_family(one, "perplexity")), None)
        if not asked or text is None or text.estimate is None:
            continue
        if not spots:
            spots.append(Spot("none", *_pooled(asked, exact=True), 1.0, 1.0, 1.0, PALETTE["muted"]))
        found = text.estimate
        low, high = (found.difference if math.isinf(bound) else bound for bound in found.difference_interval)
        ratios = [math.exp(min(max(value, -5.0), math.log(_MOST_RATIO))) for value in (found.difference, low, high)]
        colour = VERDICT_COLOURS[worst([axis.verdict for axis in asked])]
        spots.append(Spot(one.candidate.model, *_pooled(asked), ratios[0], ratios[1], ratios[2], colour))
    return spots


def _family(comparison: Comparison, family: str) -> list[AxisResult]:
    return [axis for axis in comparison.axes if axis.name.partition(":")[0] == family and axis.estimate is not None]


def _pooled(axes: Sequence[AxisResult], *, exact: bool = False) -> tuple[float, float, float]:
    """Share and Wilson interval over the prompts of several sets."""
    estimates = [axis.estimate for axis in axes if axis.estimate is not None]
    asked = sum(one.pairs for one in estimates)
    events = sum(round((one.base if exact else one.candidate) * one.pairs) for one in estimates)
    return (events / asked, *wilson_interval(events, asked))


def _near_groups(pixels: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Points that lie on each other, also by way of others, so that one label stands for all."""
    groups: list[list[int]] = []
    for place, (x, y) in enumerate(pixels):
        near = [
            group
            for group in groups
            if any(abs(x - pixels[one][0]) < _NEAR and abs(y - pixels[one][1]) < _NEAR for one in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append(sorted([place, *(one for group in near for one in group)]))
    return sorted(groups)


def _group_label(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"
