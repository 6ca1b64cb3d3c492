"""The paired numbers of one axis: rates, difference, interval, p-value, and what corrections make of them.

Covered: binary and continuous axes, clusters, correction for a judge's errors, human labels. Not covered: the verdict
(``gate.py``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from trimtab.comparison.clusters import Clustered, clustered_difference
from trimtab.comparison.judge_error import (
    JudgeErrors,
    Powered,
    corrected_difference,
    prediction_powered,
    rogan_gladen,
)
from trimtab.comparison.pairing import Pairing
from trimtab.comparison.policy import Policy
from trimtab.comparison.power import minimum_detectable_difference, minimum_detectable_mean, required_pairs
from trimtab.comparison.records import Axis
from trimtab.comparison.results import Estimate
from trimtab.comparison.statistics import (
    Interval,
    PairedTable,
    mcnemar_exact,
    mcnemar_mid_p,
    mean_interval,
    newcombe_paired_interval,
    paired_means,
    paired_table,
    wilson_interval,
)
from trimtab.errors import DataError, UsageError


def estimate_axis(
    axis: Axis,
    pairing: Pairing,
    policy: Policy,
    level: float,
    *,
    errors: JudgeErrors | None = None,
    labels: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Estimate, float]:
    """Paired numbers of one axis, and its margin.

    Args:
        axis: as measured on the base. pairing: at least one scored pair.
        level: the policy's alpha divided by the number of axes, for the resolution.
        errors: of the axis' judge, where known. labels: people's values (base, candidate) by item id.

    Raises:
        UsageError: a judge no better than a coin. DataError: labels of items that are not there, or fewer than two.
    """
    base, candidate = _values(pairing)
    margin = policy.margin_for(axis, float(np.mean(base)))
    if axis.kind == "binary":
        estimate = _binary_estimate(axis, paired_table(base, candidate), margin, policy, level)
    else:
        estimate = _continuous_estimate(axis, base, candidate, margin, policy, level)
    groups = _groups(pairing, policy)
    if groups is not None:
        differences = [after - before for before, after in zip(base, candidate, strict=True)]
        estimate = _clustered(axis, estimate, clustered_difference(differences, groups, policy.alpha))
    suited = errors.for_axis(axis.name.split(":", 1)[0]) if errors is not None and axis.kind == "binary" else None
    if suited is not None:
        estimate = _corrected(estimate, suited, policy.alpha)
    if labels:
        estimate = replace(estimate, powered=_powered(axis, pairing, labels, policy.alpha))
    return estimate, margin


def _groups(pairing: Pairing, policy: Policy) -> list[Hashable] | None:
    """The cluster of each scored pair; None where every pair stands alone."""
    items = [one for one, _ in pairing.scored]
    if policy.cluster == "none":
        return None
    if policy.cluster == "category":
        return [item.category or item.group or item.id for item in items]
    groups = [item.group or item.id for item in items]
    return list(groups) if len(set(groups)) < len(groups) else None


def _clustered(axis: Axis, estimate: Estimate, found: Clustered) -> Estimate:
    """Interval and p on whole clusters; never narrower than for independent pairs: no flips still mean doubt."""
    plain = estimate.difference_interval
    interval = Interval(min(plain.lower, found.interval.lower), max(plain.upper, found.interval.upper))
    return replace(
        estimate,
        clusters=found.clusters,
        difference_interval=interval,
        worse_interval=_turned(interval, axis.lower_is_better),
        p_value=found.p_value,
        mid_p=None,
    )


def _corrected(estimate: Estimate, errors: JudgeErrors, alpha: float) -> Estimate:
    turned = corrected_difference(estimate.worse_by, estimate.worse_interval, errors, alpha)
    rates = [rogan_gladen(round(rate * estimate.pairs), estimate.pairs, errors, alpha)
             for rate in (estimate.base, estimate.candidate)]  # fmt: skip
    return replace(estimate, corrected=turned, corrected_rates=(rates[0], rates[1]))


def _powered(axis: Axis, pairing: Pairing, labels: Mapping[str, tuple[float, float]], alpha: float) -> Powered:
    sign = 1.0 if axis.lower_is_better else -1.0
    judged: dict[str, float] = {}
    for one, other in pairing.scored:
        if one.value is not None and other.value is not None:
            judged[one.id] = sign * (other.value - one.value)
    if unknown := sorted(set(labels) - set(judged)):
        raise DataError(
            f"axis {axis.name!r}: a label belongs to no scored item", seen=unknown[0], fix="use the ids of the run"
        )
    known = [key for key in judged if key in labels]
    return prediction_powered(
        [value for key, value in judged.items() if key not in labels],
        [judged[key] for key in known],
        [sign * (labels[key][1] - labels[key][0]) for key in known],
        alpha,
    )


def _values(pairing: Pairing) -> tuple[list[float], list[float]]:
    base = [one.value for one, _ in pairing.scored if one.value is not None]
    candidate = [other.value for _, other in pairing.scored if other.value is not None]
    return base, candidate


def _binary_estimate(axis: Axis, table: PairedTable, margin: float, policy: Policy, level: float) -> Estimate:
    n = table.pairs
    base_events, candidate_events = table.both + table.base_only, table.both + table.candidate_only
    interval = newcombe_paired_interval(table, policy.alpha)
    difference = (table.candidate_only - table.base_only) / n
    worse, better = table.candidate_only, table.base_only
    if not axis.lower_is_better:
        worse, better = better, worse
    return Estimate(
        pairs=n,
        base=base_events / n,
        base_interval=wilson_interval(base_events, n, policy.alpha),
        candidate=candidate_events / n,
        candidate_interval=wilson_interval(candidate_events, n, policy.alpha),
        difference=difference,
        difference_interval=interval,
        worse_by=difference if axis.lower_is_better else -difference,
        worse_interval=_turned(interval, axis.lower_is_better),
        p_value=(mcnemar_exact if policy.test == "exact" else mcnemar_mid_p)(table.base_only, table.candidate_only),
        mid_p=mcnemar_mid_p(table.base_only, table.candidate_only),
        detectable=minimum_detectable_difference(n, table.discordant / n, level, policy.power),
        pairs_needed=_pairs_needed(margin, table.discordant / n, level, policy.power),
        worse=worse,
        better=better,
    )


def _continuous_estimate(
    axis: Axis, base: Sequence[float], candidate: Sequence[float], margin: float, policy: Policy, level: float
) -> Estimate:
    found = paired_means(base, candidate, policy.alpha)
    changes = np.asarray(candidate) - np.asarray(base)
    turned = changes if axis.lower_is_better else -changes
    spread = float(changes.std(ddof=1)) if changes.size > 1 else 0.0
    return Estimate(
        pairs=len(base),
        base=float(np.mean(base)),
        base_interval=mean_interval(base, policy.alpha),
        candidate=float(np.mean(candidate)),
        candidate_interval=mean_interval(candidate, policy.alpha),
        difference=found.difference,
        difference_interval=found.interval,
        worse_by=found.difference if axis.lower_is_better else -found.difference,
        worse_interval=_turned(found.interval, axis.lower_is_better),
        p_value=found.p_value,
        mid_p=None,
        detectable=minimum_detectable_mean(len(base), spread, level, policy.power),
        pairs_needed=None,
        worse=int(np.sum(turned > margin)),
        better=int(np.sum(turned < -margin)),
    )


def _turned(interval: Interval, lower_is_better: bool) -> Interval:
    return interval if lower_is_better else Interval(-interval.upper, -interval.lower)


def _pairs_needed(margin: float, discordant: float, level: float, power: float) -> int | None:
    """None where no realistic number of pairs would do; a plan for a million prompts helps nobody."""
    try:
        return required_pairs(margin, discordant, level, power)
    except UsageError:
        return None
