"""Items that belong together: several answers to one prompt, or prompts of one category.

Covered: a cluster bootstrap interval and a sign-flip test for a paired mean difference, both on whole clusters.
Not covered: clusters within clusters, weights. Fewer than two clusters say nothing, and the results say so.

Ten paraphrases of one question are not ten observations. Whole clusters are drawn and flipped here, so whatever goes on
inside a cluster is kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trimtab.comparison.statistics import Interval, check_level

RESAMPLES = 4_000
FLIPS = 20_000
_ALL_FLIPS_UP_TO = 14  # clusters: 2^14 sign patterns are still counted one by one
_SEED = 20_260_101


class ClusterSums(NamedTuple):
    """Sum of the differences and number of items of each cluster, in order of first appearance."""

    totals: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean difference over all items."""
        return float(self.totals.sum() / self.sizes.sum())


class Clustered(NamedTuple):
    """Interval and two-sided p of a mean difference that rests on ``clusters`` independent clusters."""

    clusters: int
    interval: Interval
    p_value: float


def cluster_sums(differences: Sequence[float], clusters: Sequence[Hashable]) -> ClusterSums:
    """Add up differences by cluster; the two sequences are parallel."""
    places: dict[Hashable, int] = {}
    index = [places.setdefault(key, len(places)) for key in clusters]
    weights = np.asarray(differences, dtype=float)
    totals = np.bincount(index, weights=weights, minlength=len(places)).astype(np.float64)
    sizes = np.bincount(index, minlength=len(places)).astype(float)
    return ClusterSums(totals, sizes)


def clustered_difference(differences: Sequence[float], clusters: Sequence[Hashable], alpha: float = 0.05) -> Clustered:
    """Interval and test of a paired mean difference, candidate - base.

    Args:
        differences: candidate - base of each item. clusters: the cluster of each item, in the same order.

    Repeats give the same numbers: the generator has a fixed seed.
    """
    check_level("alpha", alpha)
    sums = cluster_sums(differences, clusters)
    return Clustered(len(sums.sizes), bootstrap_interval(sums, alpha), sign_flip_p(sums))


def bootstrap_interval(sums: ClusterSums, alpha: float = 0.05, resamples: int = RESAMPLES) -> Interval:
    """Expanded percentile interval: whole clusters are drawn with replacement.

    With few clusters the plain percentile interval is too narrow, by the factor sqrt((G - 1) / G) and for using the
    normal where t with G - 1 degrees of freedom is due; the percentiles are moved outwards by both. Infinite with fewer
    than two clusters.

    Source: Davison and Hinkley 1997, section 3.8 (cluster resampling); Hesterberg 2015, The American Statistician
    69:371, section 5.3 (the expansion).
    """
    count = len(sums.sizes)
    if count < 2:
        return Interval(-math.inf, math.inf)
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    means = (drawn @ sums.totals) / (drawn @ sums.sizes)  # resamples
    reach = float(stats.t.ppf(1.0 - alpha / 2.0, count - 1)) * math.sqrt(count / (count - 1))
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def sign_flip_p(sums: ClusterSums, flips: int = FLIPS) -> float:
    """Two-sided p of "no difference": the sign of every cluster's sum is flipped at random.

    If the two models are exchangeable within a cluster, each sign is a fair coin, so the test is exact whatever the
    dependence inside; with clusters of one 0/1 item it is McNemar's exact test. All patterns are counted up to 14
    clusters that differ, else ``flips`` are drawn and the observed one is counted with them, so that p is never 0.

    Source: Fisher's randomisation test on cluster totals; Phipson and Smyth 2010 for the added one.
    """
    totals = sums.totals[np.abs(sums.totals) > 1e-12]
    if totals.size == 0:
        return 1.0
    seen = abs(float(totals.sum())) - 1e-9
    if totals.size <= _ALL_FLIPS_UP_TO:
        patterns = np.array(list(product((-1.0, 1.0), repeat=totals.size)))
        return float(np.mean(np.abs(patterns @ totals) >= seen))
    generator = np.random.default_rng(_SEED)
    signs = generator.integers(0, 2, size=(flips, totals.size)) * 2.0 - 1.0
    return float((1 + np.sum(np.abs(signs @ totals) >= seen)) / (flips + 1))
