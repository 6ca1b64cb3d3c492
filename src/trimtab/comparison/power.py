"""Planning a paired comparison: how much could have been found, and how many pairs it takes.

Covered: unconditional power of the exact McNemar test, the smallest difference that it finds with a given power, the
number of pairs for a given difference, and the same for paired means.

Not covered: power of a gate over several axes jointly (callers pass the corrected ``alpha`` of one axis instead), and
cost of generation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.power import TTestPower

from trimtab.comparison.statistics import check_level
from trimtab.errors import UsageError

_STEPS = 20  # halvings of [0, 1]: a millionth is far below the resolution of a rate
_MOST_PAIRS = 1_000_000


def mcnemar_power(pairs: int, difference: float, discordant: float, alpha: float = 0.05) -> float:
    """Chance that the exact two-sided McNemar test rejects, in [0, 1].

    Args:
        pairs: number of pairs, >= 0.
        difference: true difference of the two rates, in [0, ``discordant``].
        discordant: true share of pairs on which the runs differ, in (0, 1].
        alpha: level of the test, in (0, 1).

    The number of discordant pairs m is Binomial(pairs, discordant); given m, the pairs changed for the worse are
    Binomial(m, (discordant + difference) / (2 discordant)). Rejections of the exact test are summed over both, so
    nothing is approximated (terms of m beyond 12 standard deviations are dropped).

    Source: Duffy 1984, Biometrics 40:1005 (exact unconditional power of McNemar's test).
    """
    check_level("alpha", alpha)
    if not 0.0 <= difference <= discordant <= 1.0 or discordant == 0.0:
        raise UsageError(
            "power needs 0 <= difference <= discordant share <= 1",
            seen=f"difference={difference}, discordant={discordant}",
            fix="the rates cannot differ by more than the share of pairs that changed",
        )
    if pairs <= 0:
        return 0.0
    spread = 12.0 * math.sqrt(pairs * discordant * (1.0 - discordant)) + 1.0
    low, high = max(0, math.floor(pairs * discordant - spread)), min(pairs, math.ceil(pairs * discordant + spread))
    counts = np.arange(low, high + 1)
    critical = _critical_counts(counts, alpha)
    worse = (discordant + difference) / (2.0 * discordant)
    tails = stats.binom.sf(counts - critical - 1, counts, worse) + stats.binom.cdf(critical, counts, worse)
    return float(np.sum(stats.binom.pmf(counts, pairs, discordant) * np.where(critical >= 0, tails, 0.0)))


def _critical_counts(counts: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """For each number of discordant pairs: the largest smaller count that rejects, -1 where none does."""
    # ppf gives the smallest k with cdf(k) >= alpha / 2; the exact test rejects where 2 cdf(k) <= alpha.
    candidate = stats.binom.ppf(alpha / 2.0, counts, 0.5).astype(np.int64)
    fits = (2.0 * stats.binom.cdf(candidate, counts, 0.5) <= alpha) & (counts > 0)
    critical: NDArray[np.int64] = np.where(fits, candidate, candidate - 1)
    return critical


def minimum_detectable_difference(
    pairs: int, discordant: float = 0.0, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Smallest difference of two paired rates that the exact McNemar test finds with the given power.

    Args:
        pairs: number of scored pairs.
        discordant: share of pairs that flip anyway, in [0, 1], e.g. as observed. A difference d needs at least d, so
            the share assumed at d is max(discordant, d); 0 is the most favourable case, in which all flips go one way.
        alpha: level of the test. power: wanted chance of rejection.

    Returns:
        A difference in (0, 1], or None where no difference can be found (five pairs can never reject at 0.05).

    Raises:
        UsageError: ``alpha`` or ``power`` outside (0, 1), or ``discordant`` above 1.

    Source: inverts ``mcnemar_power`` by bisection. Connor 1987 (``connor_pairs``) is its large-sample counterpart.
    """
    check_level("power", power)

    def reached(difference: float) -> bool:
        return mcnemar_power(pairs, difference, max(discordant, difference), alpha) >= power

    if not reached(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if middle > 0.0 and reached(middle) else (middle, high)
    return high


def connor_pairs(difference: float, discordant: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Large-sample number of pairs for McNemar's test, unrounded.

    n = (z[1 - alpha/2] sqrt(psi) + z[power] sqrt(psi - d^2))^2 / d^2, with psi the discordant share and d the
    difference. Source: Connor 1987, Biometrics 43:207.
    """
    reject, reach = float(stats.norm.ppf(1.0 - alpha / 2.0)), float(stats.norm.ppf(power))
    return (reject * math.sqrt(discordant) + reach * math.sqrt(discordant - difference**2)) ** 2 / difference**2


def required_pairs(margin: float, discordant: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> int:
    """Number of pairs at which a true difference of ``margin`` is found with the given power.

    Args:
        margin: difference of the two rates, in (0, 1].
        discordant: share of pairs that flip, in [0, 1]; raised to ``margin`` where smaller.
        alpha: level of the test. power: wanted chance of rejection.

    The exact power rises in small saw teeth with n, so "the" smallest number is not unique; the one returned has the
    power, its predecessor has not, and it lies within a few percent of any other such number.

    Raises:
        UsageError: for a margin outside (0, 1] or one so small that more than a million pairs are needed.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    if not 0.0 < margin <= 1.0:
        raise UsageError("a margin must lie in (0, 1]", seen=margin, fix="give the margin as a share: 0.05 is 5 points")
    share = max(discordant, margin)
    approximate = connor_pairs(margin, share, alpha, power)
    if approximate > _MOST_PAIRS:
        raise UsageError("a margin this small needs more than a million pairs", seen=margin, fix="widen the margin")

    def reached(pairs: int) -> bool:
        return mcnemar_power(pairs, margin, share, alpha) >= power

    low, high = 0, max(1, math.ceil(approximate))
    while not reached(high):
        low, high = high, math.ceil(1.1 * high) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def minimum_detectable_mean(pairs: int, spread: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Smallest mean difference that a paired t-test finds with the given power, in the unit of ``spread``.

    Args:
        pairs: number of scored pairs. spread: standard deviation of the differences, >= 0.

    Returns None with fewer than two pairs. Source: noncentral t distribution, solved by statsmodels.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    if pairs < 2:
        return None
    if spread == 0.0:
        return 0.0
    effect = TTestPower().solve_power(effect_size=None, nobs=pairs, alpha=alpha, power=power, alternative="two-sided")
    return float(np.asarray(effect).reshape(-1)[0]) * spread
