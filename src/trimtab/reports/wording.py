"""Numbers and verdicts as a reader reads them.

Covered: formatting of rates, differences, intervals and p-values; one sentence for an axis, a candidate and a whole
comparison. Not covered: layout.

Every sentence carries n and the interval, and a pass prints the smallest difference that could have been found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.comparison.results import AxisResult, Comparison, Direction, Estimate, Verdict
from trimtab.comparison.statistics import Interval
from trimtab.reports.text import clip, short_name, visible

VERDICT_LABELS: dict[Verdict, str] = {
    "pass": "Pass",
    "regression": "Regression",
    "unmeasured": "Unmeasured",
    "not enough evidence": "Not enough evidence",
}
_COUNTED: dict[Verdict, str] = {
    "pass": "passed",
    "regression": "regressed",
    "unmeasured": "could not be fully measured",
    "not enough evidence": "could not be decided",
}


def family(axis: AxisResult) -> str:
    """The axis name without its data set: "compliance" for "compliance:advbench"."""
    return axis.name.split(":", 1)[0]


def axis_label(axis: AxisResult) -> str:
    """The axis as a reader calls it, on one line."""
    return clip(" ".join(visible(axis.label or axis.name).split()), 120)


def value_text(axis: AxisResult, value: float) -> str:
    """A rate as a percentage; log-likelihood as perplexity; other means with three decimals."""
    if axis.kind == "binary":
        return f"{100.0 * value:.1f}%"
    if family(axis) == "perplexity":
        return perplexity_text(value)
    return f"{value:.3f}"


def perplexity_text(nats: float) -> str:
    """Three digits, written out up to a million: 35.3, 1,980, 3.2e+12."""
    value = perplexity(nats)
    return f"{float(f'{value:.3g}'):,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def difference_text(axis: AxisResult, difference: float, *, signed: bool = True) -> str:
    """A difference in points, in percent of perplexity, or in the unit of the axis."""
    if axis.kind == "binary":
        return _number(100.0 * difference, 1, signed) + " points"
    if family(axis) == "perplexity":
        return _number(100.0 * (perplexity(difference) - 1.0), 1, signed) + "%"
    return _number(difference, 3, signed)


def interval_text(axis: AxisResult, interval: Interval, *, difference: bool) -> str:
    """Bounds joined by "to"; "unbounded" where the data say nothing."""
    if not all(math.isfinite(bound) for bound in interval):
        return "unbounded"
    if not difference:
        return f"{value_text(axis, interval.lower)} to {value_text(axis, interval.upper)}"
    low, high = (difference_text(axis, bound) for bound in interval)
    return f"{low.removesuffix(' points')} to {high}"


def p_text(p_value: float) -> str:
    """ "p < 0.001" or "p = 0.043"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def level_text(alpha: float) -> str:
    """ "95%" for alpha 0.05."""
    return f"{100.0 * (1.0 - alpha):g}%"


def change_sentence(axis: AxisResult, alpha: float) -> str:
    """What was measured: both values, the difference with its interval, n and the corrected p."""
    estimate = axis.estimate
    if estimate is None:
        return "Not measured: " + "; ".join(axis.notes) + "."
    p = (
        ""
        if axis.adjusted_p is None
        else f", Holm {p_text(axis.adjusted_p)}".replace(" p ", "\u00a0p\u00a0").replace("< ", "<\u00a0")
    )
    return (
        f"{value_text(axis, estimate.base)} → {value_text(axis, estimate.candidate)} "
        f"({difference_text(axis, estimate.difference)}, {level_text(alpha)} CI "
        f"{interval_text(axis, estimate.difference_interval, difference=True)}, n\u00a0=\u00a0{estimate.pairs:,}{p})"
    )


def reason_sentence(axis: AxisResult, power: float) -> str:
    """Why the verdict is what it is, and what could not have been seen."""
    estimate, margin = axis.estimate, axis.margin
    if estimate is None or margin is None:
        return "It cannot be called safe: an axis without a score is never a pass."
    limit = difference_text(axis, margin, signed=False)
    after = correction_sentence(axis, estimate)
    if axis.verdict == "regression":
        return f"Worse by more than the margin of {limit}, and more than chance explains.{after}"
    worst = estimate.deciding[1].upper
    bound = difference_text(axis, max(worst, 0.0), signed=False) if math.isfinite(worst) else "any amount"
    unseen = detectable_sentence(axis, estimate, power) + after
    notes = "".join(f" {note[:1].upper()}{note[1:]}." for note in axis.notes)
    if axis.verdict == "pass" and worst <= 0.0:
        return f"Not worse: the whole interval lies on the better side.{notes} {unseen}"
    if axis.verdict == "pass":
        return f"At most {bound} worse, within the margin of {limit}.{notes} {unseen}"
    more = f" About {estimate.pairs_needed:,} pairs would be needed." if estimate.pairs_needed else ""
    if estimate.pairs_needed is not None and estimate.pairs_needed <= estimate.pairs:
        more = ""  # enough pairs for a difference of the margin; what was seen lies too near to the margin
    return f"It could be worse by up to {bound}; the margin is {limit}.{notes}{more} {unseen}"


def correction_sentence(axis: AxisResult, estimate: Estimate) -> str:
    """What the verdict rests on where the judge's errors were taken out; empty where they were not."""
    if estimate.powered is None and estimate.corrected is None:
        return ""
    how = "Corrected for the judge's errors" if estimate.powered is None else "Prediction-powered, with people's labels"
    value, interval = estimate.deciding
    return f" {how}: worse by {difference_text(axis, value)} ({interval_text(axis, interval, difference=True)})."


def detectable_sentence(axis: AxisResult, estimate: Estimate, power: float) -> str:
    """The smallest difference that could have been found."""
    if estimate.detectable is None:
        return f"With {estimate.pairs:,} pairs no difference could have been found."
    found = difference_text(axis, estimate.detectable, signed=False)
    return f"Smallest difference that would have been found with {100 * power:.0f}% power: {found}."


class Change(NamedTuple):
    """Items that went from one of the judge's words to another, with the categories they lie in."""

    before: str
    after: str
    direction: Direction
    items: int
    categories: tuple[tuple[str, int], ...]


def changes(axis: AxisResult) -> list[Change]:
    """Transitions of an axis over all categories, most frequent first; an unnamed category is left out."""
    groups: dict[tuple[str, str, Direction], list[tuple[str, int]]] = {}
    for one in axis.transitions:
        key = (one.base_verdict, one.candidate_verdict, one.direction)
        groups.setdefault(key, []).append((one.category, one.count))
    found = [
        Change(before, after, direction, sum(count for _, count in parts), tuple(part for part in parts if part[0]))
        for (before, after, direction), parts in groups.items()
    ]
    return sorted(found, key=lambda change: -change.items)


def candidate_headline(comparison: Comparison) -> str:
    """One sentence: what failed, with numbers."""
    failed = [axis for axis in comparison.axes if axis.verdict == comparison.verdict]
    names = _joined([f"“{axis_label(axis)}”" for axis in failed])
    if comparison.verdict == "regression":
        return _joined([_moved(axis) for axis in failed]) + "."
    if comparison.verdict == "unmeasured":
        was, it = ("was", "it") if len(failed) == 1 else ("were", "them")
        return f"{names} {was} not measured, so nothing can be concluded about {it}."
    if comparison.verdict == "not enough evidence":
        return f"Too few items to rule out that {names} got worse by more than the margin."
    return f"No axis got worse by more than its margin ({len(comparison.axes)} measured)."


def overall_headline(comparisons: Sequence[Comparison]) -> str:
    """One sentence for the whole page."""
    if len(comparisons) == 1:
        return candidate_headline(comparisons[0])
    parts = []
    for verdict in ("regression", "unmeasured", "not enough evidence", "pass"):
        group = [one for one in comparisons if one.verdict == verdict]
        if not group:
            continue
        names = [short_name(one.candidate.model) for one in group]
        shown = _joined(names) if len(names) <= 3 else f"{len(names)} of {len(comparisons)} candidates"
        parts.append(f"{shown} {_COUNTED[verdict]}" + (_furthest(group) if verdict == "regression" else ""))
    return "; ".join(parts) + "."


def _furthest(group: Sequence[Comparison]) -> str:
    """Which of the regressed candidates is the worst, and in what: an axis of safety before any other, then by how far
    it exceeds its margin."""
    failed = [(one, axis) for one in group for axis in one.axes if axis.verdict == "regression"]

    def weight(pair: tuple[Comparison, AxisResult]) -> tuple[bool, float]:
        axis = pair[1]
        excess = axis.estimate.deciding[0] / axis.margin if axis.estimate and axis.margin else 0.0
        return family(axis) in ("compliance", "jailbreak"), excess

    one, axis = max(failed, key=weight)
    which = f", {short_name(one.candidate.model)} the most" if len(group) > 1 else ""
    return f"{which}: {_moved(axis)}"


def _moved(axis: AxisResult) -> str:
    estimate = axis.estimate
    if estimate is None:
        return f"“{axis_label(axis)}” was not measured"
    verb = "rose" if estimate.difference > 0 else "fell"
    return (
        f"“{axis_label(axis)}” {verb} from {value_text(axis, estimate.base)} to "
        f"{value_text(axis, estimate.candidate)} ({difference_text(axis, estimate.difference)})"
    )


def _joined(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def absent_or(text: str | None) -> str:
    """A value or a line of a setting; a word where a side has none, and for an empty line."""
    return "(absent)" if text is None else text if text.strip() else "(empty line)"


def _number(value: float, digits: int, signed: bool) -> str:
    """Fixed digits and a true minus sign; a value that rounds to zero has no sign."""
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def perplexity(value: float) -> float:
    """Perplexity; beyond what a float holds it is infinite, which is what the reader should see."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
