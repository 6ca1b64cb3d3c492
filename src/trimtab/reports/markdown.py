"""Comparisons as Markdown, for a pull request, a model card or a terminal.

Covered: verdict, one table for each candidate, what changed, methods. Not covered: prompts and answers, which have no
place in a pull request; the HTML and JSON reports hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.comparison.results import AxisResult, Comparison, Finding
from trimtab.reports import wording
from trimtab.reports.document import check_comparisons, shown_differences
from trimtab.reports.text import clip, markdown_text

_MARKS = {"pass": "✅", "regression": "❌", "unmeasured": "⬜", "not enough evidence": "❔"}
_MOST_CHANGES = 12


def to_markdown(comparisons: Sequence[Comparison], *, redact: bool = False) -> str:
    """GitHub-flavoured Markdown for one or more comparisons with the same base.

    Args:
        comparisons: one or more, all with the same base.
        redact: of a changed chat template name the lines only (it may hold a system prompt).

    Every text from models and data sets is escaped and set on one line.

    Raises:
        UsageError: for no comparison, or comparisons with different bases.
    """
    many = check_comparisons(comparisons)
    parts = [f"# {markdown_text(wording.overall_headline(many), 2000)}", f"Reference: {_name(many[0].base.model)}"]
    for comparison in many:
        parts += _candidate(comparison, redact)
    parts += ["## How it was measured", methods(many)]
    return "\n\n".join(parts) + "\n"


def _name(model: str) -> str:
    return f"**{markdown_text(model)}**"


def _candidate(comparison: Comparison, redact: bool) -> list[str]:
    verdict = wording.VERDICT_LABELS[comparison.verdict]
    parts = [
        f"## {_MARKS[comparison.verdict]} {markdown_text(comparison.candidate.model)}: {verdict}",
        markdown_text(wording.candidate_headline(comparison), 2000),
        comparison_table(comparison),
    ]
    if comparison.findings:
        parts.append("\n".join(line for finding in comparison.findings for line in _finding_lines(finding, redact)))
    parts.append("\n".join(f"- {_label(axis)}: {_reason(axis, comparison)}" for axis in comparison.axes))
    changed = [line for axis in comparison.axes for line in _change_lines(axis)]
    if changed:
        parts += ["### What changed", "\n".join(changed)]
    return parts


def _finding_lines(finding: Finding, redact: bool) -> list[str]:
    """What differs, and under it the keys or lines with both values."""
    lines = [f"- {markdown_text(finding.message, 400)}"]
    shown = shown_differences(finding, redact)
    for one in shown[:_MOST_CHANGES]:
        if one.base is None and one.candidate is None:
            continue
        before, after = (clip(wording.absent_or(text), 120) for text in (one.base, one.candidate))
        lines.append(f"  - {markdown_text(f'{one.place}: {before} → {after}', 400)}")
    rest = len(shown) - _MOST_CHANGES
    return [*lines, f"  - {rest:,} more"] if rest > 0 else lines


def _label(axis: AxisResult) -> str:
    return markdown_text(wording.axis_label(axis))


def _reason(axis: AxisResult, comparison: Comparison) -> str:
    return markdown_text(wording.reason_sentence(axis, comparison.policy.power), 2000)


def comparison_table(comparison: Comparison) -> str:
    """One row for each axis: both values, the change with its interval, corrected p, n, verdict."""
    level = wording.level_text(comparison.policy.alpha)
    rows = [
        f"| Axis | Reference | Candidate | Change ({level} CI) | Holm p | n | Verdict |",
        "|:--|--:|--:|:--|--:|--:|:--|",
    ]
    rows += [_row(axis) for axis in comparison.axes]
    return "\n".join(rows)


def _row(axis: AxisResult) -> str:
    label, verdict = _label(axis), f"{_MARKS[axis.verdict]} {axis.verdict}"
    estimate = axis.estimate
    if estimate is None or axis.adjusted_p is None:
        return f"| {label} | | | not measured | | 0 | {verdict} |"
    change = (
        f"{wording.difference_text(axis, estimate.difference)} "
        f"({wording.interval_text(axis, estimate.difference_interval, difference=True)})"
    )
    cells = [
        label,
        wording.value_text(axis, estimate.base),
        wording.value_text(axis, estimate.candidate),
        change,
        wording.p_text(axis.adjusted_p).removeprefix("p ").removeprefix("= ").replace("<", "&lt;"),
        f"{estimate.pairs:,}",
        verdict,
    ]
    return "| " + " | ".join(cells) + " |"


def _change_lines(axis: AxisResult) -> list[str]:
    found = wording.changes(axis)
    lines = []
    for change in found[:_MOST_CHANGES]:
        parts = [f"{markdown_text(name)} {count:,}" for name, count in change.categories[:_MOST_CHANGES]]
        where = f" ({', '.join(parts)})" if parts else ""
        words = f"{markdown_text(change.before)} → {markdown_text(change.after)}"
        lines.append(f"- {_label(axis)}: {change.items:,} {words}{where}")
    rest = sum(change.items for change in found[_MOST_CHANGES:])
    return [*lines, f"- {_label(axis)}: {rest:,} more"] if rest else lines


def methods(comparisons: Sequence[Comparison]) -> str:
    """Judge and data of each axis, and the statistics, as a list."""
    lines = [
        f"- {_label(axis)}: judge {markdown_text(axis.judge)}; data {markdown_text(axis.dataset)}."
        for axis in comparisons[0].axes
    ]
    policy = comparisons[0].policy
    lines.append(
        f"- Paired on item ids. Alpha {policy.alpha:g} over all axes (Holm), power {policy.power:g}. Binary axes: "
        f"{policy.test} McNemar test, Newcombe's paired interval{_clusters(policy.cluster)}. "
        "Continuous axes: paired t. Unscored is never counted as safe."
    )
    return "\n".join(lines)


def _clusters(how: str) -> str:
    return "; whole categories as one observation (cluster bootstrap, sign flips)" if how == "category" else ""
