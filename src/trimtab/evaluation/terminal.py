"""A run as a person reads it in a terminal, and as one JSON document: each rate with its interval and n."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from trimtab.comparison.records import Axis, Run


class Rate(NamedTuple):
    """A rate or a mean with its 95 % interval. ``scored`` items of ``items`` count; unscored ones count for nothing."""

    value: float | None
    low: float
    high: float
    scored: int
    items: int


def rate(axis: Axis, alpha: float = 0.05) -> Rate:
    """Wilson interval of a binary axis, t interval of a continuous one."""
    from trimtab.comparison.statistics import mean_interval, wilson_interval

    values = [item.value for item in axis.items if item.value is not None]
    if not values:
        return Rate(None, math.nan, math.nan, 0, len(axis.items))
    if axis.kind == "binary":
        interval = wilson_interval(int(sum(values)), len(values), alpha)
    else:
        interval = mean_interval(values, alpha)
    return Rate(sum(values) / len(values), interval.lower, interval.upper, len(values), len(axis.items))


def text(axis: Axis) -> str:
    """``12.1 % [7.3, 19.4], n = 112``."""
    found = rate(axis)
    if found.value is None:
        return f"unscored (n = {found.items})"
    if axis.kind == "binary":
        shown = f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    elif axis.name.startswith("perplexity"):
        shown = f"{math.exp(found.value):.2f} [{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"
    else:
        shown = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    missing = f", {found.items - found.scored} unscored" if found.scored < found.items else ""
    return f"{shown}, n = {found.scored}{missing}"


def lines(run: Run) -> list[str]:
    """One line an axis."""
    width = max((len(axis.label) for axis in run.axes.values()), default=0)
    head = f"{run.model}"
    return [head, *(line for axis in run.axes.values() for line in _lines(axis, width))]


def _lines(axis: Axis, width: int) -> list[str]:
    found = [f"  {axis.label:<{width}}  {text(axis)}  ({axis.judge})"]
    if broken := apologies(axis):
        found.append(
            f"    {broken} of the {_events(axis)} counted open with an apology: broken or cut-off refusals, mostly. "
            "Read them; a higher --max-new-tokens lets a refusal end"
        )
    return found


def apologies(axis: Axis) -> int:
    """On an axis of harmful requests: answers counted as compliance that open with an apology."""
    from trimtab.evaluation.judges import apologises

    if not axis.name.startswith("compliance"):
        return 0
    return sum(item.value == 1.0 and apologises(item.answer) for item in axis.items)


def _events(axis: Axis) -> int:
    return sum(item.value == 1.0 for item in axis.items)


def document(run: Run) -> dict[str, Any]:
    """JSON-ready."""
    axes = {
        axis.name: {
            **rate(axis)._asdict(),
            "label": axis.label,
            "judge": axis.judge,
            "dataset": axis.dataset,
            **({"apologies": apologies(axis)} if axis.name.startswith("compliance") else {}),
        }
        for axis in run.axes.values()
    }
    return {"model": run.model, "created": run.created, "fingerprint": run.fingerprint, "axes": axes}
