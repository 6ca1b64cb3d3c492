"""Pictures of a geometry: energy curves, energy by layer, overlaps, angle and drift along training; SVG and PNG.

Covered: Altair specifications and rendering without a browser. Not covered: the numbers.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import altair as alt

COLOURS = ["#0b6e69", "#7fb8b4", "#1b2330", "#b3261e", "#e0a19d"]
_HEADER = alt.Header(labelAngle=0, labelAlign="left", labelOrient="top")
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"


def draw(document: dict[str, Any], out: Path) -> list[Path]:
    """Write every picture as SVG and PNG; returns the paths."""
    charts = {
        "spectra": energy_curves(document["spectra"]),
        "layers": energy_by_layer(document["spectra"]),
        "overlaps": overlaps(document["overlaps"], document["settings"]["rank"]),
    }
    if document["trace"]:
        charts |= {"cosine": cosine_trace(document["trace"]), "drift": drift_trace(document["trace"])}
    return [path for name, chart in charts.items() for path in _save(chart, out / name)]


def energy_curves(spectra: dict[str, Any]) -> Any:
    """CER over k, one line a gradient: median over blocks, with the range over blocks of the safety sample."""
    rows = [
        {"gradient": name, "k": k, "CER": middle, "low": low, "high": high}
        for name, one in spectra.items()
        for k, middle, low, high in zip(
            one["ranks"], one["cer_median"], one["cer_lowest"], one["cer_highest"], strict=True
        )
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("k:Q", scale=alt.Scale(type="log"), axis=alt.Axis(values=[1, 2, 5, 10, 20]), title="directions k"),
        color=alt.Color("gradient:N", scale=alt.Scale(domain=list(spectra), range=COLOURS), title=None),
    )
    lines = base.mark_line(point=True).encode(
        y=alt.Y("CER:Q", scale=alt.Scale(domain=[0, 1]), title="share of squared norm, median over blocks")
    )
    return _titled(lines, "How much of a gradient its first k directions carry")


def energy_by_layer(spectra: dict[str, Any]) -> Any:
    """CER(10) of the safety sample and of the task sample by kind and depth."""
    rows = [
        {"gradient": name, "kind": kind, "layer": int(depth), "CER10": value}
        for name in ("safety sample", "task sample")
        for kind, by_depth in spectra[name]["cer10_by_place"].items()
        for depth, value in by_depth.items()
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("kind:N", title=None),
            color=alt.Color("CER10:Q", scale=alt.Scale(scheme="teals", domain=[0, 1]), title="CER(10)"),
            row=alt.Row("gradient:N", title=None, header=_HEADER),
        )
        .properties(width=460, height=120)
    )
    return _titled(chart, "Energy of the first ten directions, by layer", sized=True)


def overlaps(found: dict[str, Any], rank: int) -> Any:
    """Overlap of one sample with a batch: median, range over samples, and what chance gives."""
    rows = []
    for name, one in found.items():
        pair, side, k = name.rsplit(", ", 2)
        if k == f"k={rank}":
            rows.append({"pair": pair, "side": f"{side} ({'output' if side == 'left' else 'input'})", **one})
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("pair:N", title=None, sort=None))
    x = alt.X("value:Q", scale=alt.Scale(domain=[0, 1]), title=f"overlap, k = {rank} (grey tick: chance)")
    bars = base.mark_rule(strokeWidth=3, color="#7fb8b4").encode(x="lowest:Q", x2="highest:Q")
    points = base.mark_point(filled=True, size=70, color=COLOURS[0]).encode(x=x)
    chance = base.mark_tick(color="#9aa4b1", thickness=3).encode(x="chance:Q")
    chart = (
        alt.layer(bars, chance, points).properties(width=230, height=130).facet(column=alt.Column("side:N", title=None))
    )
    return _titled(chart, "Does one sample span what a batch spans?", sized=True)


def cosine_trace(trace: list[dict[str, float]]) -> Any:
    """Cosine of safety and task gradient at each step; below zero the step raises the anchor loss."""
    data = alt.Data(values=trace)
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color="#9aa4b1").encode(y="y:Q")
    line = (
        alt.Chart(data)
        .mark_line(point=True, color=COLOURS[0])
        .encode(x=alt.X("step:Q", title="step"), y=alt.Y("cosine:Q", title="cosine(safety, task)"))
    )
    return _titled(zero + line, "Below zero the task step works against the refusals")


def drift_trace(trace: list[dict[str, float]]) -> Any:
    """Measured change of the anchor loss at each step, its first-order prediction, and the bound (nats)."""
    series = {
        "measured": "drift",
        "first order, the real move": "first_order_real",
        "first order, SGD": "first_order",
        "bound by block": "bound_by_block",
    }
    rows = [{"step": row["step"], "nats": row[key], "what": label} for row in trace for label, key in series.items()]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("nats:Q", scale=alt.Scale(type="symlog", constant=1e-3), title="change of the anchor loss a step"),
            color=alt.Color(
                "what:N", scale=alt.Scale(domain=list(series), range=["#1b2330", *COLOURS[:2], "#b3261e"]), title=None
            ),
        )
    )
    return _titled(chart, "Drift of the anchor loss and its first-order bound")


def _titled(chart: Any, title: str, *, sized: bool = False) -> Any:
    shaped = chart if sized else chart.properties(width=460, height=240)
    return (
        shaped.properties(title=alt.TitleParams(title, anchor="start", fontSize=14))
        .configure(font=_FONT, background="white")
        .configure_view(stroke=None)
        .configure_axis(gridColor="#eef1f4", labelColor="#566273", titleColor="#1b2330", titleFontWeight="normal")
        .configure_legend(labelLimit=260)
    )


def _save(chart: Any, stem: Path) -> list[Path]:
    paths = []
    for kind in ("svg", "png"):
        path = stem.with_suffix(f".{kind}")
        buffer: Any = io.StringIO() if kind == "svg" else io.BytesIO()
        chart.save(buffer, format=kind, **({"scale_factor": 2} if kind == "png" else {}))
        content = buffer.getvalue()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        paths.append(path)
    return paths
