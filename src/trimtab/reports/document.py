"""Comparisons as one JSON-ready document, the machine's report and the source of the HTML page's items.

Covered: every number of the comparison, changed items, a schema version. Not covered: items that changed in no
candidate (they stay in the logs).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from trimtab.comparison.differences import Difference
from trimtab.comparison.judge_error import Corrected
from trimtab.comparison.policy import Policy
from trimtab.comparison.results import EXIT_CODES, AxisResult, Comparison, Estimate, Finding, ItemPair, Side, worst
from trimtab.comparison.statistics import Interval
from trimtab.errors import UsageError
from trimtab.reports import wording

SCHEMA = "trimtab.comparison/1"
_DIRECTION_ORDER = {"worse": 0, "unscored": 1, "better": 2, "same": 3}


def check_comparisons(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The comparisons as a tuple.

    Raises:
        UsageError: where there is none, or where they do not share their base.
    """
    if not comparisons:
        raise UsageError("a report needs at least one comparison", fix="compare at least one candidate first")
    first = comparisons[0].base
    for other in comparisons[1:]:
        if other.base != first:
            raise UsageError(
                "all comparisons of one report must share their base",
                seen=f"{first.model!r} and {other.base.model!r}",
                fix="write one report for each base",
            )
    return tuple(comparisons)


def to_document(comparisons: Sequence[Comparison], *, redact: bool = False) -> dict[str, Any]:
    """Comparisons with one base as a JSON-ready dictionary.

    Args:
        comparisons: one or more, all with the same base.
        redact: leave prompts and answers out (None); ids, categories and verdicts stay.

    Infinite bounds become None. Rates are shares in [0, 1], differences candidate - base.

    Raises:
        UsageError: as ``check_comparisons``.
    """
    many = check_comparisons(comparisons)
    verdict = worst([one.verdict for one in many])
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "headline": wording.overall_headline(many),
        "redacted": redact,
        "base": _side(many[0].base),
        "candidates": [_candidate(one, redact) for one in many],
        "items": changed_items(many, redact=redact),
    }


def to_json(comparisons: Sequence[Comparison], *, redact: bool = False) -> str:
    """``to_document`` as indented ASCII JSON, so that no control character reaches a terminal."""
    return json.dumps(to_document(comparisons, redact=redact), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def changed_items(comparisons: Sequence[Comparison], *, redact: bool = False) -> list[dict[str, Any]]:
    """Every item that changed in at least one candidate, worse ones first, then by axis and id.

    Each entry of "candidates" stands for the comparison at the same place, None where the item is missing there.
    """
    pairs: dict[tuple[int, str], list[ItemPair | None]] = {}
    axes: dict[int, AxisResult] = dict(enumerate(comparisons[0].axes))
    order = {axis.name: place for place, axis in axes.items()}
    for place, comparison in enumerate(comparisons):
        for axis in comparison.axes:
            for pair in axis.pairs:
                row = pairs.setdefault((order[axis.name], pair.id), [None] * len(comparisons))
                row[place] = pair
    changed = [(key, row) for key, row in pairs.items() if any(pair is not None and pair.changed for pair in row)]
    changed.sort(key=lambda entry: (min(_DIRECTION_ORDER[p.direction] for p in entry[1] if p), entry[0]))
    return [_item(axes[key[0]], row, redact) for key, row in changed]


def _item(axis: AxisResult, row: Sequence[ItemPair | None], redact: bool) -> dict[str, Any]:
    known = next(pair for pair in row if pair is not None)
    return {
        "axis": axis.name,
        "id": known.id,
        "category": known.category,
        "prompt": None if redact else known.prompt,
        "base": {
            "verdict": known.base_verdict,
            "value": known.base_value,
            "answer": None if redact else known.base_answer,
        },
        "candidates": [_changed_side(pair, redact) for pair in row],
    }


def _changed_side(pair: ItemPair | None, redact: bool) -> dict[str, Any] | None:
    if pair is None:
        return None
    return {
        "direction": pair.direction,
        "verdict": pair.candidate_verdict,
        "value": pair.candidate_value,
        "answer": None if redact else pair.candidate_answer,
    }


def _side(side: Side) -> dict[str, Any]:
    return {"model": side.model, "created": side.created, "fingerprint": dict(side.fingerprint)}


def shown_differences(finding: Finding, redact: bool) -> tuple[Difference, ...]:
    """Keys with values, lines with texts; redacted, the texts of lines are left out (a template may hold a prompt)."""
    if not redact:
        return finding.differences
    return tuple(one._replace(base=None, candidate=None) if one.kind == "line" else one for one in finding.differences)


def _candidate(comparison: Comparison, redact: bool) -> dict[str, Any]:
    return {
        **_side(comparison.candidate),
        "verdict": comparison.verdict,
        "exit_code": comparison.exit_code,
        "headline": wording.candidate_headline(comparison),
        "policy": _policy(comparison.policy),
        "findings": [
            {
                "kind": one.kind,
                "key": one.key,
                "base": one.base,
                "candidate": one.candidate,
                "message": one.message,
                "differences": [dict(row._asdict()) for row in shown_differences(one, redact)],
            }
            for one in comparison.findings
        ],
        "axes": [_axis(axis, comparison.policy) for axis in comparison.axes],
    }


def _policy(policy: Policy) -> dict[str, Any]:
    return {
        "alpha": policy.alpha,
        "power": policy.power,
        "margin": policy.margin,
        "relative_margin": policy.relative_margin,
        "margins": dict(policy.margins),
        "max_lost": policy.max_lost,
        "test": policy.test,
        "cluster": policy.cluster,
    }


def _axis(axis: AxisResult, policy: Policy) -> dict[str, Any]:
    return {
        "name": axis.name,
        "label": axis.label,
        "kind": axis.kind,
        "lower_is_better": axis.lower_is_better,
        "judge": axis.judge,
        "dataset": axis.dataset,
        "verdict": axis.verdict,
        "summary": f"{wording.change_sentence(axis, policy.alpha)} {wording.reason_sentence(axis, policy.power)}",
        "margin": axis.margin,
        "adjusted_p": axis.adjusted_p,
        "estimate": None if axis.estimate is None else _estimate(axis.estimate),
        "unscored_base": axis.unscored_base,
        "unscored_candidate": axis.unscored_candidate,
        "missing_in_base": list(axis.missing_in_base),
        "missing_in_candidate": list(axis.missing_in_candidate),
        "transitions": [
            {
                "from": one.base_verdict,
                "to": one.candidate_verdict,
                "category": one.category,
                "direction": one.direction,
                "count": one.count,
            }
            for one in axis.transitions
        ],
        "notes": list(axis.notes),
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "pairs": estimate.pairs,
        "base": estimate.base,
        "base_interval": _bounds(estimate.base_interval),
        "candidate": estimate.candidate,
        "candidate_interval": _bounds(estimate.candidate_interval),
        "difference": estimate.difference,
        "difference_interval": _bounds(estimate.difference_interval),
        "worse_by": estimate.worse_by,
        "worse_interval": _bounds(estimate.worse_interval),
        "p_value": estimate.p_value,
        "mid_p": estimate.mid_p,
        "detectable": estimate.detectable,
        "pairs_needed": estimate.pairs_needed,
        "worse": estimate.worse,
        "better": estimate.better,
        "clusters": estimate.clusters,
        "corrected": None if estimate.corrected is None else _corrected(estimate.corrected),
        "corrected_rates": None if estimate.corrected_rates is None else [*map(_corrected, estimate.corrected_rates)],
        "powered": None
        if estimate.powered is None
        else {**estimate.powered._asdict(), "interval": _bounds(estimate.powered.interval)},
    }


def _corrected(found: Corrected) -> dict[str, Any]:
    return {**found._asdict(), "interval": _bounds(found.interval)}


def _bounds(interval: Interval) -> list[float | None]:
    return [bound if math.isfinite(bound) else None for bound in interval]
