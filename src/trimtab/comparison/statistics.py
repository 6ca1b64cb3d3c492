"""Paired statistics as pure functions: tests, intervals, correction for several axes.

Covered: exact and mid-p McNemar, Wilson interval, Newcombe's paired interval, paired t, Holm. Planning (power, number
of pairs, smallest difference that could have been found) is in ``power.py``.

Not covered: clustered items (several answers to one prompt, families of similar prompts), repeated looks at growing
data, and the judge's own errors. All intervals here assume independent pairs and a verdict that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from trimtab.errors import UsageError


class Interval(NamedTuple):
    """A two-sided confidence interval; bounds may be infinite where the data say nothing."""

    lower: float
    upper: float


class PairedTable(NamedTuple):
    """Counts of pairs by whether the event happened: first in the base, then in the candidate."""

    both: int
    base_only: int
    candidate_only: int
    neither: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.both + self.base_only + self.candidate_only + self.neither

    @property
    def discordant(self) -> int:
        """Number of pairs on which the two runs differ; only these carry information about a change."""
        return self.base_only + self.candidate_only


class PairedMeans(NamedTuple):
    """Outcome of a paired comparison of means: mean difference, its t interval, two-sided p."""

    difference: float
    interval: Interval
    p_value: float


def check_level(name: str, value: float) -> None:
    """Raise ``UsageError`` unless ``value`` lies strictly between 0 and 1."""
    if not 0.0 < value < 1.0:
        usual = 0.8 if name == "power" else 0.05
        raise UsageError(f"{name} must lie strictly between 0 and 1", seen=value, fix=f"set {name} to, say, {usual}")


def paired_table(base: Sequence[float], candidate: Sequence[float]) -> PairedTable:
    """Count pairs of 0/1 outcomes.

    Args:
        base: 0.0 or 1.0 for each item, in the same order as ``candidate``.
        candidate: likewise.
    """
    first, second = np.asarray(base, dtype=bool), np.asarray(candidate, dtype=bool)
    return PairedTable(
        both=int(np.sum(first & second)),
        base_only=int(np.sum(first & ~second)),
        candidate_only=int(np.sum(~first & second)),
        neither=int(np.sum(~first & ~second)),
    )


def mcnemar_exact(base_only: int, candidate_only: int) -> float:
    """Two-sided exact McNemar p-value: a fair-coin binomial test on the discordant pairs.

    Returns 1.0 without discordant pairs. Never rejects too often, at the price of being conservative when there are
    few discordant pairs. Source: McNemar 1947, Psychometrika 12:153; computed by ``scipy.stats.binomtest``.
    """
    discordant = base_only + candidate_only
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(min(base_only, candidate_only), discordant, 0.5).pvalue)


def mcnemar_mid_p(base_only: int, candidate_only: int) -> float:
    """Two-sided mid-p McNemar: the exact p-value less the probability of the observed table.

    Less conservative than the exact test and rarely above its nominal level, but not guaranteed, so the gate decides on
    it only with ``test: mid-p`` in the policy, and otherwise shows it beside the exact one. Source: Fagerland, Lydersen
    and Laake 2013, BMC Medical Research Methodology 13:91, which sets the value at a tie to 1 - half of that
    probability.
    """
    discordant = base_only + candidate_only
    if discordant == 0:
        return 1.0
    point = float(stats.binom.pmf(min(base_only, candidate_only), discordant, 0.5))
    if base_only == candidate_only:
        return 1.0 - 0.5 * point
    return mcnemar_exact(base_only, candidate_only) - point


def wilson_interval(events: int, trials: int, alpha: float = 0.05) -> Interval:
    """Wilson score interval of one proportion, in [0, 1]; (0, 1) when there are no trials.

    Source: Wilson 1927, JASA 22:209, without continuity correction; computed by SciPy.
    """
    check_level("alpha", alpha)
    if trials == 0:
        return Interval(0.0, 1.0)
    found = stats.binomtest(events, trials).proportion_ci(confidence_level=1.0 - alpha, method="wilson")
    # At the edges the closed form is exactly 0 or 1 and rounding must not move it off: the rate must lie inside.
    share = events / trials
    return Interval(min(float(found.low), share), max(float(found.high), share))


def newcombe_paired_interval(table: PairedTable, alpha: float = 0.05) -> Interval:
    """Interval of the difference candidate rate - base rate from paired outcomes, in [-1, 1].

    The Wilson intervals of the two rates are combined by squaring and adding, less a term for their correlation phi,
    whose numerator is shrunk by half the number of pairs when positive. It keeps its coverage near 0 and 1, where
    safety rates live and where the textbook interval collapses to a point. (-1, 1) without pairs.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10. Written out because neither SciPy 1.17 nor
    statsmodels 0.15 has it (both offer only the interval for independent samples).
    """
    check_level("alpha", alpha)
    n = table.pairs
    if n == 0:
        return Interval(-1.0, 1.0)
    base_events, candidate_events = table.both + table.base_only, table.both + table.candidate_only
    base, candidate = base_events / n, candidate_events / n
    base_ci, candidate_ci = wilson_interval(base_events, n, alpha), wilson_interval(candidate_events, n, alpha)
    phi = _newcombe_phi(table)
    difference = candidate - base
    below, above = candidate - candidate_ci.lower, base_ci.upper - base
    lower = difference - _joined(below, above, phi)
    below, above = base - base_ci.lower, candidate_ci.upper - candidate
    upper = difference + _joined(below, above, phi)
    return Interval(max(-1.0, lower), min(1.0, upper))


def _joined(first: float, second: float, phi: float) -> float:
    """Length of the sum of two correlated deviations; never negative under the root, rounding aside."""
    return math.sqrt(max(0.0, first * first - 2.0 * phi * first * second + second * second))


def _newcombe_phi(table: PairedTable) -> float:
    """Correlation of the two outcomes with Newcombe's correction; 0 where a margin is empty."""
    both, base_only, candidate_only, neither = table
    margins = (both + base_only) * (candidate_only + neither) * (both + candidate_only) * (base_only + neither)
    if margins == 0:
        return 0.0
    numerator = float(both * neither - base_only * candidate_only)
    if numerator > 0:
        numerator = max(numerator - table.pairs / 2.0, 0.0)
    return numerator / math.sqrt(margins)


def mean_interval(values: Sequence[float], alpha: float = 0.05) -> Interval:
    """t interval of a mean; infinite with fewer than two values. Source: Student 1908, Biometrika 6:1."""
    check_level("alpha", alpha)
    sample = np.asarray(values, dtype=float)
    if sample.size < 2:
        return Interval(-math.inf, math.inf)
    mean, spread = float(sample.mean()), float(sample.std(ddof=1))
    half = float(stats.t.ppf(1.0 - alpha / 2.0, sample.size - 1)) * spread / math.sqrt(sample.size)
    return Interval(mean - half, mean + half)


def paired_means(base: Sequence[float], candidate: Sequence[float], alpha: float = 0.05) -> PairedMeans:
    """Paired comparison of means, candidate - base, by the t distribution of the differences.

    With fewer than two pairs the interval is infinite and p is 1. Where every difference is the same number the spread
    is zero: p is 1 for no change and 0 otherwise. The t-test is used rather than Wilcoxon's because the verdict is
    about the mean and test and interval must not contradict each other.

    Source: Student 1908, Biometrika 6:1.
    """
    differences = np.asarray(candidate, dtype=float) - np.asarray(base, dtype=float)
    if differences.size == 0:
        return PairedMeans(0.0, Interval(-math.inf, math.inf), 1.0)
    mean, interval = float(differences.mean()), mean_interval(differences.tolist(), alpha)
    if differences.size < 2:
        return PairedMeans(mean, interval, 1.0)
    error = float(differences.std(ddof=1)) / math.sqrt(differences.size)
    if error == 0.0:
        return PairedMeans(mean, interval, 1.0 if mean == 0.0 else 0.0)
    p_value = 2.0 * float(stats.t.sf(abs(mean) / error, differences.size - 1))
    return PairedMeans(mean, interval, min(1.0, p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values in the order given; controls the chance of any false alarm over all axes.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65; computed by statsmodels.
    """
    if not p_values:
        return []
    adjusted = multipletests(np.asarray(p_values, dtype=float), method="holm")[1]
    return [float(p) for p in adjusted]
