"""Pictures of a search, as SVG files: compliance over noise, sensitivity by layer, clusters before and after.

Covered: drawing. Not covered: measuring (``probe.py``, ``clusters.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt

if TYPE_CHECKING:
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
