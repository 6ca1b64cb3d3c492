"""The gate's binary formulas on thousands of paired tables at once.

Covered: Wilson, Newcombe's paired interval, exact and mid-p McNemar on arrays; used where a plan or a simulation needs
many tables. Not covered: anything that ``statistics.py`` does not define; the two are tested to agree.

Shapes: ``tables`` is (..., 4) integers in the order of ``PairedTable``: both, base only, candidate only, neither.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Bounds(NamedTuple):
    """Lower and upper bounds, one of each for every table."""

    lower: Floats
    upper: Floats


def wilson_many(events: Counts, trials: Counts | int, alpha: float) -> Bounds:
    """Wilson score intervals. Source: Wilson 1927, JASA 22:209; without continuity correction."""
    z = float(stats.norm.ppf(1.0 - alpha / 2.0))
    n = np.asarray(trials, dtype=float)
    share = events / n
    centre = share + z * z / (2.0 * n)
    half = z * np.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    scale = 1.0 + z * z / n
    return Bounds(np.minimum((centre - half) / scale, share), np.maximum((centre + half) / scale, share))


def newcombe_many(tables: Counts, alpha: float) -> Bounds:
    """Newcombe's paired intervals of candidate rate - base rate. Source: Newcombe 1998, method 10."""
    both, base_only, candidate_only, neither = np.moveaxis(np.asarray(tables, dtype=np.int64), -1, 0)
    n = both + base_only + candidate_only + neither
    base, candidate = (both + base_only) / n, (both + candidate_only) / n
    first, second = wilson_many(both + base_only, n, alpha), wilson_many(both + candidate_only, n, alpha)
    phi = _phi(both, base_only, candidate_only, neither, n)
    difference = candidate - base
    lower = difference - _joined(candidate - second.lower, first.upper - base, phi)
    upper = difference + _joined(base - first.lower, second.upper - candidate, phi)
    return Bounds(np.maximum(lower, -1.0), np.minimum(upper, 1.0))


def mcnemar_many(base_only: Counts, candidate_only: Counts, *, mid_p: bool = False) -> Floats:
    """Two-sided McNemar p-values, exact or mid-p; 1 without discordant pairs."""
    few, total = np.minimum(base_only, candidate_only), base_only + candidate_only
    point = stats.binom.pmf(few, total, 0.5)
    exact = np.minimum(1.0, 2.0 * stats.binom.cdf(few, total, 0.5))
    if not mid_p:
        return np.where(total == 0, 1.0, exact)
    found = np.where(base_only == candidate_only, 1.0 - 0.5 * point, exact - point)
    return np.where(total == 0, 1.0, found)


def _joined(first: Floats, second: Floats, phi: Floats) -> Floats:
    joined: Floats = np.sqrt(np.maximum(0.0, first**2 - 2.0 * phi * first * second + second**2))
    return joined


def _phi(both: Counts, base_only: Counts, candidate_only: Counts, neither: Counts, n: Counts) -> Floats:
    margins = (both + base_only) * (candidate_only + neither) * (both + candidate_only) * (base_only + neither)
    numerator = (both * neither - base_only * candidate_only).astype(float)
    numerator = np.where(numerator > 0, np.maximum(numerator - n / 2.0, 0.0), numerator)
    phi: Floats = np.where(margins == 0, 0.0, numerator / np.sqrt(np.maximum(margins, 1)))
    return phi
