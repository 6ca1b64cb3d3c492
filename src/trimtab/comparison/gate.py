"""Two runs and a policy in, one verdict out.

Covered: the decision on each axis, the overall verdict, what else differs between the runs. Not covered: wording and
layout (``reports/``), and whether the judge is right.

The rule for one axis, with d the difference turned so that positive is worse:

- regression: the interval of d lies above 0, the Holm-adjusted p is below alpha, and d exceeds the margin;
- pass: the upper bound of d is within the margin (non-inferiority is shown, not merely "no significant difference");
- not enough evidence: everything between.

Regression needs the correction for several axes because any one of them raises the alarm. Pass needs none because
every axis has to pass (an intersection-union test). ``docs/design/comparison.md`` gives the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trimtab.comparison.differences import differences, places
from trimtab.comparison.estimates import estimate_axis
from trimtab.comparison.judge_error import JudgeErrors
from trimtab.comparison.pairing import Pairing, pair_axes
from trimtab.comparison.policy import Policy
from trimtab.comparison.records import Axis, Item, Run
from trimtab.comparison.results import (
    AxisResult,
    Comparison,
    Direction,
    Estimate,
    Finding,
    HumanLabels,
    ItemPair,
    Side,
    Transition,
    Verdict,
    worst,
)
from trimtab.comparison.statistics import holm
from trimtab.errors import DataError, UsageError


def compare(
    base: Run,
    candidate: Run,
    policy: Policy | None = None,
    *,
    judge_errors: Sequence[JudgeErrors] = (),
    human_labels: HumanLabels | None = None,
) -> Comparison:
    """Compare a changed model with the one that it came from.

    Args:
        base: the reference. candidate: the changed model, measured with the same judge on the same data.
        policy: error rates and margins; defaults to ``Policy()``.
        judge_errors: measured error rates of judges; an axis whose judge is among them is corrected by them.
        human_labels: for an axis, people's values (base, candidate) of some items, drawn at random; the axis is then
            judged by prediction-powered inference.

    Raises:
        DataError: if the base has no axis, or an axis cannot be paired (see ``pair_axes``).
        UsageError: if the policy has a margin for an axis that neither run has.
    """
    policy = policy or Policy()
    _check_axes(base, candidate, policy)
    pairings = {name: _pairing(axis, candidate.axes.get(name)) for name, axis in base.axes.items()}
    measured = {name: pairing for name, pairing in pairings.items() if pairing is not None and pairing.scored}
    level = policy.alpha / max(1, len(measured))
    rates = {errors.judge: errors for errors in judge_errors}
    estimates = {
        name: estimate_axis(
            base.axes[name],
            pairing,
            policy,
            level,
            errors=rates.get(base.axes[name].judge),
            labels=(human_labels or {}).get(name, {}),
        )
        for name, pairing in measured.items()
    }
    adjusted = dict(zip(measured, holm([estimates[name][0].p_value for name in measured]), strict=True))
    axes = tuple(
        _judged(axis, pairings[name], estimates.get(name), adjusted.get(name, 1.0), policy)
        for name, axis in base.axes.items()
    )
    return Comparison(
        base=Side(base.model, base.created, dict(base.fingerprint)),
        candidate=Side(candidate.model, candidate.created, dict(candidate.fingerprint)),
        policy=policy,
        axes=axes,
        findings=tuple(_findings(base, candidate)),
        verdict=worst([axis.verdict for axis in axes]),
    )


def decide(estimate: Estimate, adjusted_p: float, margin: float, policy: Policy, lost_share: float) -> Verdict:
    """The rule of this file's header for one measured axis.

    Args:
        estimate: the paired numbers. adjusted_p: Holm-adjusted p-value. margin: in the axis' unit, > 0.
        lost_share: share of the base's scored items without a score in the candidate, in [0, 1]; above
            ``policy.max_lost`` a pass is withheld, since the items that were lost may be the ones that got worse.
    """
    worse_by, interval = estimate.deciding
    if interval.lower > 0.0 and adjusted_p < policy.alpha and worse_by > margin:
        return "regression"
    if interval.upper <= margin and lost_share <= policy.max_lost:
        return "pass"
    return "not enough evidence"


def _check_axes(base: Run, candidate: Run, policy: Policy) -> None:
    if not base.axes:
        raise DataError("the base run has no axis", seen=base.model, fix="measure the base first")
    known = {name for run in (base, candidate) for name in run.axes}
    known |= {name.split(":", 1)[0] for name in known}
    for name in policy.margins:
        if name not in known:
            raise UsageError(
                "the policy has a margin for an axis that neither run has",
                seen=repr(name),
                fix=f"use one of: {', '.join(sorted(known))}",
            )
    for run in (base, candidate):
        for name, axis in run.axes.items():
            if axis.name != name:
                raise DataError(
                    f"run {run.model!r} files an axis under another name",
                    seen=f"{name!r} holds {axis.name!r}",
                    fix="use the axis' own name as its key",
                )


def _pairing(base: Axis, candidate: Axis | None) -> Pairing | None:
    """None where a side holds no items at all: unmeasured, which the verdict says; anything odder raises."""
    if candidate is None or not candidate.items or not base.items:
        return None
    return pair_axes(base, candidate)


def _judged(
    axis: Axis, pairing: Pairing | None, found: tuple[Estimate, float] | None, adjusted_p: float, policy: Policy
) -> AxisResult:
    lost = _lost(axis, pairing)
    scored_in_base = sum(item.value is not None for item in axis.items)
    verdict: Verdict = "unmeasured"
    notes: list[str] = []
    estimate, margin = found or (None, None)
    if estimate is not None and margin is not None:
        share = lost / scored_in_base
        verdict = decide(estimate, adjusted_p, margin, policy, share)
        notes = _notes(estimate, verdict, policy, share, lost)
    else:
        notes = ["no item was scored in both runs" if pairing is not None else "the candidate was not measured"]
    pairs = () if pairing is None else tuple(_item_pairs(axis, pairing, margin))
    return AxisResult(
        name=axis.name,
        label=axis.label,
        kind=axis.kind,
        lower_is_better=axis.lower_is_better,
        judge=axis.judge,
        dataset=axis.dataset,
        verdict=verdict,
        estimate=estimate,
        adjusted_p=adjusted_p if estimate is not None else None,
        margin=margin,
        unscored_base=_unscored(axis.items),
        unscored_candidate=pairing.unscored_candidate if pairing is not None else 0,
        missing_in_base=pairing.missing_in_base if pairing is not None else (),
        missing_in_candidate=pairing.missing_in_candidate if pairing else tuple(item.id for item in axis.items),
        pairs=pairs,
        transitions=_transitions(pairs),
        notes=tuple(notes),
    )


def _unscored(items: Sequence[Item]) -> int:
    """Number of items without a value."""
    return sum(item.value is None for item in items)


def _lost(axis: Axis, pairing: Pairing | None) -> int:
    """Items that the base scored and the candidate lacks or left unscored."""
    if pairing is None:
        return sum(item.value is not None for item in axis.items)
    gone = set(pairing.missing_in_candidate)
    return pairing.lost + sum(item.id in gone and item.value is not None for item in axis.items)


def _notes(estimate: Estimate, verdict: Verdict, policy: Policy, lost_share: float, lost: int) -> list[str]:
    notes = []
    lower = estimate.deciding[1].lower
    if estimate.clusters is not None:
        notes.append(f"interval and p rest on {estimate.clusters} clusters, not on {estimate.pairs} answers")
    if verdict == "pass" and lower > 0.0:
        notes.append("worse, within the margin")
    if verdict == "not enough evidence" and lower > 0.0:
        notes.append("worse, but not shown to be worse by more than the margin")
    if lost_share > policy.max_lost:
        notes.append(
            f"{lost} items that the base scored have no score in the candidate ({lost_share:.0%}, allowed "
            f"{policy.max_lost:.0%}); they may be the ones that got worse"
        )
    return notes


def _item_pairs(axis: Axis, pairing: Pairing, margin: float | None) -> list[ItemPair]:
    threshold = 0.0 if axis.kind == "binary" else (margin or 0.0)
    return [
        ItemPair(
            id=one.id,
            category=one.category,
            prompt=one.prompt,
            base_answer=one.answer,
            candidate_answer=other.answer,
            base_verdict=one.verdict,
            candidate_verdict=other.verdict,
            base_value=one.value,
            candidate_value=other.value,
            direction=_direction(one, other, axis.lower_is_better, threshold),
        )
        for one, other in (*pairing.scored, *pairing.unscored)
    ]


def _direction(base: Item, candidate: Item, lower_is_better: bool, threshold: float) -> Direction:
    """Item level: on a continuous axis every value moves a little, so only moves beyond the margin count."""
    if base.value is None or candidate.value is None:
        return "unscored"
    change = candidate.value - base.value
    turned = change if lower_is_better else -change
    if turned > threshold:
        return "worse"
    return "better" if turned < -threshold else "same"


def _transitions(pairs: Sequence[ItemPair]) -> tuple[Transition, ...]:
    """Counts of changed verdicts by category, most frequent first; also changes that leave the value alone."""
    counts = Counter(
        (pair.base_verdict, pair.candidate_verdict, pair.category, pair.direction)
        for pair in pairs
        if pair.base_verdict != pair.candidate_verdict
    )
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(Transition(*key, count=count) for key, count in ordered)


def _differing(base: Run, candidate: Run, key: str, ours: str, theirs: str) -> Finding:
    """A setting that changed, with the keys or lines that changed in it where both runs kept them."""
    hashed = base.texts.get(key), candidate.texts.get(key)
    first, second = (text for text in hashed) if None not in hashed else (ours, theirs)
    found = differences(str(first), str(second)) if None not in hashed or ours.startswith("{") else ()
    where = f" in {places(found)}" if found else ""
    message = f"{key} differs{where}: the change may come from it and not from the weights"
    return Finding("differs", key, ours, theirs, message, found)


def _findings(base: Run, candidate: Run) -> list[Finding]:
    """What else differs between the runs, so that a difference is not blamed on the wrong cause."""
    findings = []
    for key in sorted({*base.fingerprint, *candidate.fingerprint}):
        ours, theirs = base.fingerprint.get(key), candidate.fingerprint.get(key)
        if ours is None or theirs is None:
            side = "base" if ours is None else "candidate"
            findings.append(Finding("not recorded", key, ours, theirs, f"{key} was not recorded for the {side}"))
        elif key == "weights":
            if ours == theirs:
                findings.append(Finding("same weights", key, ours, theirs, "both runs have the same weights"))
        elif ours != theirs:
            findings.append(_differing(base, candidate, key, ours, theirs))
    for name in candidate.axes:
        if name not in base.axes:
            message = f"axis {name} was measured on the candidate only and is not compared"
            findings.append(Finding("not compared", name, None, None, message))
    return findings
