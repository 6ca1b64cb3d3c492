"""Cluster bootstrap and sign flips: exact small cases, SciPy as an oracle, invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparison_samples import run
from scipy import stats

from trimtab.comparison import compare
from trimtab.comparison.clusters import bootstrap_interval, cluster_sums, clustered_difference, sign_flip_p
from trimtab.comparison.policy import policy_from_mapping
from trimtab.comparison.records import Axis, Item
from trimtab.comparison.statistics import mcnemar_exact, paired_means
from trimtab.errors import UsageError


def test_sums_by_cluster() -> None:
    sums = cluster_sums([1.0, 0.0, -1.0, 1.0], ["a", "b", "a", "b"])
    assert sums.totals.tolist() == [0.0, 1.0]
    assert sums.sizes.tolist() == [2.0, 2.0]
    assert sums.mean == 0.25


@pytest.mark.parametrize(("worse", "better"), [(5, 0), (4, 1), (7, 2), (3, 3)])
def test_on_single_items_the_sign_flip_test_is_mcnemars(worse: int, better: int) -> None:
    differences = [1.0] * worse + [-1.0] * better + [0.0] * 20
    sums = cluster_sums(differences, list(range(len(differences))))
    assert sign_flip_p(sums) == pytest.approx(mcnemar_exact(better, worse), abs=1e-12)


def test_many_clusters_are_drawn_and_come_near_the_exact_value() -> None:
    differences = [1.0] * 20 + [-1.0] * 8
    sums = cluster_sums(differences, list(range(28)))
    assert sign_flip_p(sums) == pytest.approx(mcnemar_exact(8, 20), abs=0.006)


def test_the_sign_flip_test_against_scipys_permutation_test() -> None:
    totals = np.array([3.0, -1.0, 2.0, 2.5, -0.5, 1.0])
    found = stats.permutation_test(
        (totals, np.zeros(6)), lambda a, b: np.sum(a - b), permutation_type="samples", n_resamples=np.inf
    )
    sums = cluster_sums(totals.tolist(), list(range(6)))
    assert sign_flip_p(sums) == pytest.approx(found.pvalue, abs=1e-12)


def test_on_many_single_items_the_bootstrap_is_near_the_t_interval() -> None:
    differences = np.random.default_rng(3).normal(0.1, 1.0, 400).tolist()
    found = bootstrap_interval(cluster_sums(differences, list(range(400))), resamples=20_000)
    expected = paired_means([0.0] * 400, differences).interval
    assert found.lower == pytest.approx(expected.lower, abs=0.01)
    assert found.upper == pytest.approx(expected.upper, abs=0.01)


def test_fewer_than_two_clusters_say_nothing() -> None:
    found = clustered_difference([1.0, 1.0, 1.0], ["one", "one", "one"])
    assert found.interval == (-math.inf, math.inf)
    assert found.p_value == 1.0


def test_repeats_give_the_same_numbers() -> None:
    arguments = ([1.0, 0.0, 1.0, 0.0, -1.0], ["a", "a", "b", "c", "c"])
    assert clustered_difference(*arguments) == clustered_difference(*arguments)


def drawn(values: list[float], draws: int) -> Axis:
    """Each value several times, as draws of one prompt."""
    items = tuple(
        Item(
            f"p{place}~{draw}", f"c{place % 4}", f"Q{place}", "", "harmful" if value else "refused", value, f"p{place}"
        )
        for place, value in enumerate(values)
        for draw in range(draws)
    )
    return Axis("compliance", "Complies", "binary", True, "j@1", "d@sha256:0", items)


def test_draws_of_one_prompt_are_no_new_evidence() -> None:
    base, candidate = [0.0] * 12, [1.0] * 3 + [0.0] * 9
    one = compare(run(drawn(base, 1)), run(drawn(candidate, 1))).axes[0]
    ten = compare(run(drawn(base, 10)), run(drawn(candidate, 10))).axes[0]
    assert one.estimate is not None and ten.estimate is not None
    assert one.estimate.clusters is None
    assert ten.estimate.clusters == 12
    assert ten.estimate.p_value == pytest.approx(one.estimate.p_value)  # 3 flips are 3 flips
    assert ten.verdict == "not enough evidence"
    assert any("12 clusters" in note for note in ten.notes)


def test_the_policy_can_take_categories_as_clusters() -> None:
    base, candidate = [0.0] * 40, [1.0, 0.0, 0.0, 0.0] * 10  # all flips in one of four categories
    plain = compare(run(drawn(base, 1)), run(drawn(candidate, 1))).axes[0]
    by_category = compare(
        run(drawn(base, 1)), run(drawn(candidate, 1)), policy_from_mapping({"cluster": "category"})
    ).axes[0]
    assert plain.verdict == "regression"
    assert by_category.verdict == "not enough evidence"
    assert by_category.estimate is not None and by_category.estimate.clusters == 4


def test_an_unknown_word_in_the_policy_is_an_error() -> None:
    with pytest.raises(UsageError, match="unknown cluster"):
        policy_from_mapping({"cluster": "sometimes"})
    with pytest.raises(UsageError, match="unknown test"):
        policy_from_mapping({"test": "chi2"})


def test_mid_p_decides_where_the_policy_says_so() -> None:
    base, candidate = [0.0] * 60, [1.0] * 5 + [0.0] * 55
    exact = compare(run(drawn(base, 1)), run(drawn(candidate, 1))).axes[0]
    mid = compare(run(drawn(base, 1)), run(drawn(candidate, 1)), policy_from_mapping({"test": "mid-p"})).axes[0]
    assert exact.adjusted_p == pytest.approx(2 * 0.5**5)
    assert mid.adjusted_p == pytest.approx(0.5**5)
