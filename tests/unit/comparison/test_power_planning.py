"""Power and planning against sums by hand, a published formula and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimtab.comparison.power import (
    connor_pairs,
    mcnemar_power,
    minimum_detectable_difference,
    minimum_detectable_mean,
    required_pairs,
)
from trimtab.comparison.statistics import mcnemar_exact
from trimtab.errors import UsageError


def power_by_hand(pairs: int, worse: float, better: float, alpha: float) -> float:
    """Sum the trinomial over all outcomes that the exact test rejects."""
    total = 0.0
    for up in range(pairs + 1):
        for down in range(pairs + 1 - up):
            if mcnemar_exact(up, down) <= alpha and up + down > 0:
                ways = math.comb(pairs, up) * math.comb(pairs - up, down)
                total += ways * worse**up * better**down * (1 - worse - better) ** (pairs - up - down)
    return total


@pytest.mark.parametrize(
    ("pairs", "difference", "discordant", "alpha"),
    [(12, 0.3, 0.5, 0.05), (20, 0.0, 0.4, 0.05), (20, 0.4, 0.4, 0.01), (15, 1.0, 1.0, 0.05)],
)
def test_power_is_the_sum_over_all_outcomes(pairs: int, difference: float, discordant: float, alpha: float) -> None:
    worse, better = (discordant + difference) / 2, (discordant - difference) / 2
    assert mcnemar_power(pairs, difference, discordant, alpha) == pytest.approx(
        power_by_hand(pairs, worse, better, alpha), abs=1e-10
    )


@given(st.integers(1, 400), st.floats(0.01, 1.0), st.sampled_from([0.01, 0.05]))
@settings(deadline=None)
def test_without_a_difference_power_stays_below_alpha(pairs: int, discordant: float, alpha: float) -> None:
    assert 0.0 <= mcnemar_power(pairs, 0.0, discordant, alpha) <= alpha + 1e-12


def test_power_agrees_with_simulation() -> None:
    rng = np.random.default_rng(7)
    draws = rng.multinomial(200, [0.12, 0.04, 0.84], size=4_000)
    rejected = np.mean([mcnemar_exact(int(up), int(down)) <= 0.05 for up, down, _ in draws])
    assert mcnemar_power(200, 0.08, 0.16) == pytest.approx(rejected, abs=0.025)


def test_connor_by_hand() -> None:
    """Discordant shares 0.45 and 0.05 (the worked example of the formula's R implementation): 22 pairs."""
    by_hand = (1.959964 * math.sqrt(0.5) + 0.841621 * math.sqrt(0.5 - 0.16)) ** 2 / 0.16
    assert connor_pairs(0.4, 0.5) == pytest.approx(by_hand, rel=1e-5)
    assert math.floor(by_hand) == 22


@given(st.sampled_from([20, 50, 100, 300]), st.floats(0.0, 0.6))
@settings(deadline=None, max_examples=30)
def test_the_detectable_difference_sits_on_the_edge_of_power(pairs: int, discordant: float) -> None:
    found = minimum_detectable_difference(pairs, discordant)
    assert found is not None
    assert mcnemar_power(pairs, found, max(discordant, found)) >= 0.8
    below = found - 1e-3
    if below > 0:
        assert mcnemar_power(pairs, below, max(discordant, below)) < 0.8


def test_five_pairs_can_find_nothing() -> None:
    assert minimum_detectable_difference(5) is None  # the smallest exact p of five pairs is 2/32
    assert minimum_detectable_difference(6) is not None
    assert minimum_detectable_difference(0) is None


@pytest.mark.parametrize(("margin", "discordant"), [(0.05, 0.0), (0.05, 0.2), (0.2, 0.5), (0.01, 0.1)])
def test_required_pairs_reach_the_power_and_lie_near_connor(margin: float, discordant: float) -> None:
    needed, share = required_pairs(margin, discordant), max(margin, discordant)
    assert mcnemar_power(needed, margin, share) >= 0.8
    assert mcnemar_power(needed - 1, margin, share) < 0.8
    # The exact test is conservative, so it needs more than the large-sample number, but not much more.
    assert connor_pairs(margin, share) <= needed <= 1.25 * connor_pairs(margin, share) + 5


def test_detectable_mean_is_where_the_noncentral_t_has_the_power() -> None:
    found = minimum_detectable_mean(30, 2.0)
    assert found is not None
    shift, critical = found / 2.0 * math.sqrt(30), stats.t.ppf(0.975, 29)
    power = stats.nct.sf(critical, 29, shift) + stats.nct.cdf(-critical, 29, shift)
    assert power == pytest.approx(0.8, abs=1e-6)
    assert minimum_detectable_mean(1, 2.0) is None
    assert minimum_detectable_mean(10, 0.0) == 0.0


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.5, 1e-6])
def test_margins_without_a_plan_are_refused(margin: float) -> None:
    with pytest.raises(UsageError, match="margin"):
        required_pairs(margin)


def test_a_difference_above_the_flips_is_refused() -> None:
    with pytest.raises(UsageError, match="discordant"):
        mcnemar_power(10, 0.5, 0.2)
