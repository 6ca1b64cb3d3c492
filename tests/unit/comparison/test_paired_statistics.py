"""Every statistic against an oracle of its own: a published number, a closed form, another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparison_samples import table_values
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from trimtab.comparison.statistics import (
    PairedTable,
    holm,
    mcnemar_exact,
    mcnemar_mid_p,
    mean_interval,
    newcombe_paired_interval,
    paired_means,
    paired_table,
    wilson_interval,
)
from trimtab.errors import UsageError

COUNTS = st.integers(min_value=0, max_value=60)
TABLES = st.builds(PairedTable, COUNTS, COUNTS, COUNTS, COUNTS).filter(lambda table: table.pairs > 0)


@pytest.mark.parametrize(
    ("first", "second", "exact", "mid"),
    [
        (1, 7, 0.0703125, 0.0390625),  # Bentur et al. 2009, as in Fagerland et al. 2013: 18/256 and 10/256
        (6, 16, 0.052479, 0.034690),  # Cavo et al. 2012, as printed by the R package contingencytables
        (0, 5, 2 / 32, 1 / 32),
        (3, 3, 1.0, 1.0 - 0.5 * 20 / 64),
        (0, 0, 1.0, 1.0),
    ],
)
def test_mcnemar_reproduces_published_values(first: int, second: int, exact: float, mid: float) -> None:
    assert mcnemar_exact(first, second) == pytest.approx(exact, abs=1e-6)
    assert mcnemar_mid_p(first, second) == pytest.approx(mid, abs=1e-6)


@given(COUNTS, COUNTS)
def test_exact_mcnemar_agrees_with_statsmodels_and_with_the_sum_by_hand(first: int, second: int) -> None:
    ours = mcnemar_exact(first, second)
    assert ours == pytest.approx(mcnemar([[3, first], [second, 4]], exact=True).pvalue, abs=1e-12)
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    assert ours == pytest.approx(min(1.0, 2.0 * tail), abs=1e-12)


@given(COUNTS, COUNTS)
def test_mid_p_is_symmetric_and_never_above_exact(first: int, second: int) -> None:
    assert mcnemar_mid_p(first, second) == mcnemar_mid_p(second, first)
    assert 0.0 < mcnemar_mid_p(first, second) <= mcnemar_exact(first, second) + 1e-12


@given(st.integers(0, 80), st.integers(1, 80), st.sampled_from([0.01, 0.05, 0.2]))
def test_wilson_agrees_with_closed_form_and_statsmodels(events: int, trials: int, alpha: float) -> None:
    events = min(events, trials)
    found = wilson_interval(events, trials, alpha)
    z, share = stats.norm.ppf(1 - alpha / 2), events / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    assert found == pytest.approx((max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)
    assert found == pytest.approx(proportion_confint(events, trials, alpha, method="wilson"), abs=1e-9)
    assert 0.0 <= found.lower <= share <= found.upper <= 1.0


def test_wilson_without_trials_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("table", "difference", "lower", "upper"),
    [
        # Newcombe 1998, Statistics in Medicine 17:2635, method 10: (e, f, g, h), difference (f - g) / n.
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.2, 0.0562, 0.3290),
        ((53, 0, 0, 1), 0.0, -0.0729, 0.0729),
        # Cavo et al. 2012, as printed by the R package contingencytables (Fagerland, Lydersen, Laake).
        ((59, 6, 16, 80), -10 / 161, -0.1186, -0.0046),
    ],
)
def test_newcombe_reproduces_published_intervals(
    table: tuple[int, int, int, int], difference: float, lower: float, upper: float
) -> None:
    both, first_only, second_only, neither = table
    # Published differences are first - second; ours is candidate - base, so the first outcome is the candidate.
    ours = PairedTable(both, base_only=second_only, candidate_only=first_only, neither=neither)
    assert (ours.candidate_only - ours.base_only) / ours.pairs == pytest.approx(difference)
    assert newcombe_paired_interval(ours) == pytest.approx((lower, upper), abs=6e-5)


@given(TABLES, st.sampled_from([0.01, 0.05, 0.2]))
def test_newcombe_is_antisymmetric_bounded_and_holds_its_estimate(table: PairedTable, alpha: float) -> None:
    found = newcombe_paired_interval(table, alpha)
    swapped = newcombe_paired_interval(
        PairedTable(table.both, table.candidate_only, table.base_only, table.neither), alpha
    )
    assert found == pytest.approx((-swapped.upper, -swapped.lower), abs=1e-12)
    difference = (table.candidate_only - table.base_only) / table.pairs
    assert -1.0 <= found.lower <= difference + 1e-12
    assert difference - 1e-12 <= found.upper <= 1.0


@given(TABLES)
def test_newcombe_widens_with_the_level(table: PairedTable) -> None:
    wide, narrow = newcombe_paired_interval(table, 0.01), newcombe_paired_interval(table, 0.2)
    assert wide.lower <= narrow.lower + 1e-12
    assert wide.upper >= narrow.upper - 1e-12


def test_newcombe_without_correlation_is_the_independent_interval() -> None:
    """An empty margin makes phi zero, where the method becomes Newcombe's method 10 for independent samples."""
    from statsmodels.stats.proportion import confint_proportions_2indep

    table = PairedTable(both=0, base_only=0, candidate_only=7, neither=33)
    expected = confint_proportions_2indep(7, 40, 0, 40, method="newcomb", compare="diff")
    assert newcombe_paired_interval(table) == pytest.approx(expected, abs=1e-9)


def test_newcombe_covers_as_often_as_it_claims() -> None:
    """Exact coverage by summing the multinomial over all tables of 25 pairs, at a rate near the edge and mid-range."""
    from itertools import product

    n = 25
    for cells in ([0.02, 0.02, 0.10, 0.86], [0.30, 0.10, 0.20, 0.40]):
        truth, covered = cells[2] - cells[1], 0.0
        for first, second, third in product(range(n + 1), repeat=3):
            rest = n - first - second - third
            if rest < 0:
                continue
            chance = stats.multinomial.pmf([first, second, third, rest], n, cells)
            if chance < 1e-9:
                continue
            low, high = newcombe_paired_interval(PairedTable(first, second, third, rest))
            covered += chance * (low <= truth <= high)
        assert covered > 0.93


@given(TABLES)
def test_table_counts_what_the_values_say(table: PairedTable) -> None:
    assert paired_table(*table_values(*table)) == table


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=40))
@settings(deadline=None)
def test_paired_means_agree_with_scipy(pairs: list[tuple[float, float]]) -> None:
    base, candidate = (list(side) for side in zip(*pairs, strict=True))
    differences = np.subtract(candidate, base)
    if differences.std(ddof=1) < 1e-6:
        return
    found, expected = paired_means(base, candidate), stats.ttest_rel(candidate, base)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-9)
    interval = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
    assert found.interval.lower <= found.difference <= found.interval.upper
    turned = paired_means(candidate, base)
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.p_value == pytest.approx(found.p_value)


def test_paired_means_at_the_edges() -> None:
    nothing = paired_means([], [])
    assert nothing.p_value == 1.0
    assert math.isinf(nothing.interval.upper)
    assert paired_means([1.0], [2.0]).p_value == 1.0
    assert paired_means([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_means([1.0, 2.0], [2.0, 3.0]).p_value == 0.0


def test_mean_interval_by_hand() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t quantile for two degrees of freedom, from tables
    assert (low, high) == pytest.approx((2 - half, 2 + half))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_holm_agrees_with_the_definition(p_values: list[float]) -> None:
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    expected, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        expected[place] = running
    assert holm(p_values) == pytest.approx(expected, abs=1e-12)


def test_holm_of_nothing() -> None:
    assert holm([]) == []


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_level_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        wilson_interval(1, 2, alpha)
