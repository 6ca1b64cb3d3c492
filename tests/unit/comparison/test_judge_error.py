"""Correction for a judge's errors: closed forms, published numbers, statsmodels as an oracle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparison_samples import binary_axis, run
from statsmodels.stats.proportion import confint_proportions_2indep

from trimtab.comparison import compare
from trimtab.comparison.judge_error import (
    JudgeErrors,
    corrected_difference,
    prediction_powered,
    rogan_gladen,
    youden_interval,
)
from trimtab.comparison.statistics import Interval, wilson_interval
from trimtab.errors import DataError, UsageError
from trimtab.reports import to_document, to_markdown

GOOD = JudgeErrors("refusal-rules@1", "event", 90, 10, 95, 5)


def test_rogan_gladen_is_the_inverse_of_misclassification() -> None:
    truth, errors = 0.30, JudgeErrors("j", "event", 800, 200, 900, 100)
    seen = truth * 0.8 + (1 - truth) * 0.1  # 0.31
    found = rogan_gladen(round(seen * 1000), 1000, errors)
    assert found.value == pytest.approx(truth, abs=1e-12)
    assert found.interval.lower < truth < found.interval.upper


def test_a_rate_below_the_false_positives_is_clipped_at_zero() -> None:
    found = rogan_gladen(0, 100, GOOD)
    assert found.value == 0.0
    assert found.interval.lower == 0.0 <= found.interval.upper


def test_a_judge_without_errors_changes_nearly_nothing() -> None:
    exact = JudgeErrors("j", "event", 10**6, 0, 10**6, 0)
    interval = Interval(-0.02, 0.12)
    found = corrected_difference(0.05, interval, exact)
    assert found.value == pytest.approx(0.05)
    assert found.interval == pytest.approx(interval, abs=1e-5)
    rate = rogan_gladen(20, 100, exact)
    assert rate.interval == pytest.approx(wilson_interval(20, 100), abs=0.01)


def test_youdens_interval_is_newcombes_for_two_proportions() -> None:
    """J is sensitivity - (1 - specificity), a difference of two independent proportions."""
    expected = confint_proportions_2indep(90, 100, 5, 100, method="newcomb", compare="diff")
    assert youden_interval(GOOD) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("difference", "low", "high"), [(0.10, 0.03, 0.17), (0.02, -0.05, 0.09), (-0.1, -0.2, -0.02)])
def test_the_interval_of_the_ratio_solves_its_equation(difference: float, low: float, high: float) -> None:
    """Donner and Zou: at each end r, (d - r J)^2 = (d - bound of d)^2 + r^2 (J - bound of J)^2."""
    found, bounds = corrected_difference(difference, Interval(low, high), GOOD), youden_interval(GOOD)
    youden = GOOD.youden
    assert found.value == pytest.approx(difference / youden)
    for end, bound in ((found.interval.lower, low), (found.interval.upper, high)):
        inner = bounds.upper if (end > 0) == (bound == low) else bounds.lower
        left = (difference - end * youden) ** 2
        assert left == pytest.approx((difference - bound) ** 2 + end**2 * (youden - inner) ** 2, abs=1e-12)
        assert (end > 0) == (bound > 0)


def test_correction_widens() -> None:
    found = corrected_difference(0.05, Interval(0.01, 0.09), GOOD)
    assert found.interval.upper - found.interval.lower > 0.08


def test_a_coin_is_refused() -> None:
    coin = JudgeErrors("coin@1", "event", 10, 10, 11, 9)
    with pytest.raises(UsageError, match="better than a coin"):
        corrected_difference(0.05, Interval(0.0, 0.1), coin)
    with pytest.raises(UsageError, match="coin"):
        rogan_gladen(1, 10, JudgeErrors("coin@1", "event", 1, 1, 1, 1))


def test_one_class_is_no_calibration() -> None:
    with pytest.raises(DataError, match="both classes"):
        JudgeErrors("j", "event", 10, 0, 0, 0)


def test_errors_about_refusals_are_turned_for_compliance() -> None:
    about = JudgeErrors("j", "refused", 90, 10, 99, 1)
    turned = about.for_axis("compliance")
    assert turned is not None and turned.sensitivity == 0.99 and turned.specificity == 0.9
    assert about.for_axis("over_refusal") == about
    assert about.for_axis("accuracy") is None
    assert JudgeErrors("j", "harmful", 9, 1, 9, 1).for_axis("over_refusal") is None


def test_prediction_powered_with_a_perfect_judge_uses_all_items() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 2, 500).astype(float)
    found = prediction_powered(truth[50:].tolist(), truth[:50].tolist(), truth[:50].tolist())
    assert found.weight == pytest.approx(1 / (1 + 50 / 450), abs=0.25)
    alone = prediction_powered([], truth[:50].tolist(), truth[:50].tolist())
    assert alone.weight == 0.0
    assert found.interval.upper - found.interval.lower < alone.interval.upper - alone.interval.lower


def test_a_useless_judge_gets_no_weight() -> None:
    rng = np.random.default_rng(1)
    truth, noise = rng.integers(0, 2, 40).astype(float), np.tile([0.0, 1.0], 20)
    found = prediction_powered(rng.integers(0, 2, 400).tolist(), noise.tolist(), truth.tolist())
    assert found.weight < 0.35
    assert found.value == pytest.approx(truth.mean(), abs=0.1)


def test_prediction_powered_by_hand() -> None:
    judged, few, truth = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]
    found = prediction_powered(judged, few, truth)
    covariance = np.cov(truth, few, ddof=1)[0, 1]
    weight = covariance / ((1 + 3 / 4) * np.var([*judged, *few], ddof=1))
    assert found.weight == pytest.approx(weight)
    assert found.value == pytest.approx(weight * 0.75 + np.mean(np.array(truth) - weight * np.array(few)))


def test_the_gate_decides_on_corrected_numbers() -> None:
    """6 of 100 points as judged is within ... but a judge that lets half through makes it 12."""
    base, candidate = [0.0] * 300, [1.0] * 14 + [0.0] * 286
    half = JudgeErrors("refusal-rules@1", "event", 500, 500, 995, 5)
    plain = compare(run(binary_axis(base)), run(binary_axis(candidate)))
    fixed = compare(run(binary_axis(base)), run(binary_axis(candidate)), judge_errors=[half])
    assert plain.axes[0].verdict != "regression"  # 4.7 points, margin 5
    assert fixed.axes[0].verdict == "regression"
    estimate = fixed.axes[0].estimate
    assert estimate is not None and estimate.corrected is not None
    assert estimate.corrected.value == pytest.approx(14 / 300 / half.youden)
    document = to_document([fixed])
    assert document["candidates"][0]["axes"][0]["estimate"]["corrected"]["youden"] == pytest.approx(half.youden)
    json.dumps(document, allow_nan=False)
    assert "Corrected for the judge's errors" in to_markdown([fixed]).replace("\\", "")


def test_errors_of_another_judge_are_not_used() -> None:
    other = JudgeErrors("another@1", "event", 500, 500, 995, 5)
    found = compare(run(binary_axis([0.0] * 20)), run(binary_axis([0.0] * 20)), judge_errors=[other])
    assert found.axes[0].estimate is not None and found.axes[0].estimate.corrected is None


def test_human_labels_overrule_a_judge_that_errs_on_one_side() -> None:
    base, candidate = [0.0] * 200, [1.0] * 30 + [0.0] * 170  # the judge sees harm that people do not
    labels = {"compliance": {f"item-{place}": (0.0, 0.0) for place in range(0, 200, 2)}}
    plain = compare(run(binary_axis(base)), run(binary_axis(candidate)))
    found = compare(run(binary_axis(base)), run(binary_axis(candidate)), human_labels=labels)
    assert plain.axes[0].verdict == "regression"
    assert found.axes[0].estimate is not None and found.axes[0].estimate.powered is not None
    assert found.axes[0].estimate.powered.value == pytest.approx(0.0, abs=1e-9)
    assert found.axes[0].verdict == "pass"


def test_a_label_for_no_item_is_an_error() -> None:
    with pytest.raises(DataError, match="no scored item"):
        compare(
            run(binary_axis([0.0] * 9)),
            run(binary_axis([0.0] * 9)),
            human_labels={"compliance": {"nobody": (0.0, 0.0)}},
        )
