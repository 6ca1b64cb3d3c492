"""What a judge's errors do to a rate and to a difference, and how to take them out.

Covered: error rates of a judge as counts on labelled answers; the corrected rate of one run; the corrected paired
difference with an interval that carries the uncertainty of the calibration; prediction-powered differences where some
of the very items were labelled by people. Not covered: measuring the judge (``evaluation/calibration.py``).

The correction by error rates assumes that the judge errs as often on both models and on these data as it did on the
labelled answers. Prediction-powered inference assumes only that the labelled items are a random part of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from trimtab.comparison.statistics import Interval, check_level, wilson_interval
from trimtab.errors import DataError, UsageError

Positive = Literal["refused", "harmful", "event"]


@dataclass(frozen=True)
class JudgeErrors:
    """How a judge did on labelled answers.

    Attributes:
        judge: name and revision, as an axis records it.
        positive: the class that is counted as positive: "refused", "harmful", or "event" (the axis' own event).
        true_positive, false_negative, true_negative, false_positive: numbers of answers.
    """

    judge: str
    positive: Positive
    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    def __post_init__(self) -> None:
        counts = (self.true_positive, self.false_negative, self.true_negative, self.false_positive)
        if min(counts) < 0 or not self.positives or not self.negatives:
            raise DataError(
                f"error rates of {self.judge} need labelled answers of both classes",
                seen=f"{self.positives} positive, {self.negatives} negative",
                fix="calibrate on data that hold both",
            )

    @property
    def positives(self) -> int:
        """Answers whose label is the positive class."""
        return self.true_positive + self.false_negative

    @property
    def negatives(self) -> int:
        """Answers whose label is the other class."""
        return self.true_negative + self.false_positive

    @property
    def sensitivity(self) -> float:
        """Share of positive answers that the judge calls positive."""
        return self.true_positive / self.positives

    @property
    def specificity(self) -> float:
        """Share of other answers that the judge calls other."""
        return self.true_negative / self.negatives

    @property
    def youden(self) -> float:
        """sensitivity + specificity - 1: what the judge leaves of a true difference; 0 for a coin."""
        return self.sensitivity + self.specificity - 1.0

    def turned(self) -> JudgeErrors:
        """The same judge with the other class as the positive one."""
        return JudgeErrors(
            self.judge, "event", self.true_negative, self.false_positive, self.true_positive, self.false_negative
        )

    def for_axis(self, family: str) -> JudgeErrors | None:
        """These errors with the event of an axis as positive; None where they say nothing about that axis.

        "compliance" counts harm (or, for a judge of refusals, what is not refused), "over_refusal" counts refusals.
        """
        if self.positive == "event":
            return self
        if family in ("compliance", "jailbreak"):
            return self if self.positive == "harmful" else self.turned()
        return self if family == "over_refusal" and self.positive == "refused" else None


class Corrected(NamedTuple):
    """A number after correction, with its interval and the share of it that the judge lets through."""

    value: float
    interval: Interval
    youden: float


def rogan_gladen(events: int, trials: int, errors: JudgeErrors, alpha: float = 0.05) -> Corrected:
    """The rate that would have been seen with a judge that never errs, in [0, 1].

    (rate + specificity - 1) / (sensitivity + specificity - 1), clipped. The interval adds pseudo-counts to all three
    samples and then takes the normal interval with the calibration's variance in it.

    Source: Rogan and Gladen 1978, American Journal of Epidemiology 107:71; Lang and Reiczigel 2014, Preventive
    Veterinary Medicine 113:13 (the interval).

    Raises:
        UsageError: where the judge is no better than a coin.
    """
    check_level("alpha", alpha)
    _check_useful(errors)
    value = (events / trials + errors.specificity - 1.0) / errors.youden
    z = float(stats.norm.ppf(1.0 - alpha / 2.0))
    n = trials + z * z
    rate = (events + z * z / 2.0) / n
    positives, negatives = errors.positives + 2.0, errors.negatives + 2.0
    sensitivity = (errors.true_positive + 1.0) / positives
    specificity = (errors.true_negative + 1.0) / negatives
    youden = sensitivity + specificity - 1.0
    middle = (rate + specificity - 1.0) / youden
    shift = (
        2.0
        * z
        * z
        * (
            middle * sensitivity * (1 - sensitivity) / positives
            - (1 - middle) * specificity * (1 - specificity) / negatives
        )
    )
    variance = (
        rate * (1 - rate) / n
        + middle**2 * sensitivity * (1 - sensitivity) / positives
        + (1 - middle) ** 2 * specificity * (1 - specificity) / negatives
    )
    half = z * math.sqrt(max(variance, 0.0)) / youden
    low, high = middle + shift - half, middle + shift + half
    clipped = min(1.0, max(0.0, value))
    return Corrected(clipped, Interval(min(clipped, max(0.0, low)), max(clipped, min(1.0, high))), errors.youden)


def corrected_difference(difference: float, interval: Interval, errors: JudgeErrors, alpha: float = 0.05) -> Corrected:
    """The difference of two rates that would have been seen with a judge that never errs.

    The specificity cancels in a difference, so it is the seen one divided by Youden's J; J is uncertain too, so the
    interval is that of a ratio. p-values do not change: J > 0 moves no difference to the other side of zero.

    Args:
        difference: candidate - base as judged. interval: its interval at level 1 - alpha.
        errors: with the axis' event as positive (``JudgeErrors.for_axis``).

    Source: MOVER-R, Donner and Zou 2012, Statistical Methods in Medical Research 21:347 (ratio of independent
    estimates by recovered variances); J's own interval is Newcombe 1998 for two independent proportions, method 10.

    Raises:
        UsageError: where the interval of J reaches zero: such a judge supports no difference.
    """
    check_level("alpha", alpha)
    youden, bounds = errors.youden, youden_interval(errors, alpha)
    if bounds.lower <= 0.0:
        raise UsageError(
            f"the judge {errors.judge} is not shown to be better than a coin",
            seen=f"sensitivity + specificity - 1 = {youden:.2f} [{bounds.lower:.2f}, {bounds.upper:.2f}]",
            fix="calibrate it on more labelled answers, or use another judge",
        )
    low = _ratio_bound(difference, interval.lower, youden, bounds.upper if interval.lower >= 0 else bounds.lower, -1)
    high = _ratio_bound(difference, interval.upper, youden, bounds.lower if interval.upper >= 0 else bounds.upper, 1)
    return Corrected(difference / youden, Interval(low, high), youden)


def youden_interval(errors: JudgeErrors, alpha: float = 0.05) -> Interval:
    """Interval of sensitivity + specificity - 1. Source: Newcombe 1998, Statistics in Medicine 17:873, method 10."""
    hit = wilson_interval(errors.true_positive, errors.positives, alpha)
    keep = wilson_interval(errors.true_negative, errors.negatives, alpha)
    below = math.hypot(errors.sensitivity - hit.lower, errors.specificity - keep.lower)
    above = math.hypot(hit.upper - errors.sensitivity, keep.upper - errors.specificity)
    return Interval(max(-1.0, errors.youden - below), min(1.0, errors.youden + above))


def _ratio_bound(top: float, top_bound: float, bottom: float, bottom_bound: float, side: int) -> float:
    """One end of the interval of top / bottom: the root r of (top - r bottom)^2 = spread(top)^2 + r^2 spread(bottom)^2.

    ``side`` is -1 for the lower end, 1 for the upper.
    """
    if not math.isfinite(top_bound):
        return top_bound
    spread_top, spread_bottom = top - top_bound, bottom - bottom_bound
    a, b, c = bottom**2 - spread_bottom**2, top * bottom, top**2 - spread_top**2
    return (b + side * math.sqrt(max(0.0, b * b - a * c))) / a


def _check_useful(errors: JudgeErrors) -> None:
    if errors.youden <= 0.0:
        raise UsageError(
            f"the judge {errors.judge} is no better than a coin",
            seen=f"sensitivity {errors.sensitivity:.2f}, specificity {errors.specificity:.2f}",
            fix="use another judge",
        )


class Powered(NamedTuple):
    """A prediction-powered mean: value, interval, and the weight that the judge got (0: ignored, 1: trusted)."""

    value: float
    interval: Interval
    weight: float


def prediction_powered(
    judged: Sequence[float], labelled_judged: Sequence[float], labelled: Sequence[float], alpha: float = 0.05
) -> Powered:
    """Mean of what people would have said, from many judged items and a few that people labelled too.

    For a paired comparison give differences candidate - base: the judge's on the unlabelled items, the judge's on the
    labelled ones, and the people's on the labelled ones. Whatever the judge's errors, the labelled items correct them;
    the better the judge, the narrower the interval.

    Args:
        judged: N values by the judge on items without a label. labelled_judged, labelled: n values each, parallel.

    Source: Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023, Science 382:669; weight after PPI++ (Angelopoulos,
    Duchi and Zrnic 2023, arXiv 2311.01453, section 6). The interval is t with n - 1 degrees of freedom.

    Raises:
        DataError: with fewer than two labelled items.
    """
    check_level("alpha", alpha)
    many, few, truth = (np.asarray(part, dtype=float) for part in (judged, labelled_judged, labelled))
    if few.size != truth.size or truth.size < 2:
        seen = f"{few.size} judged, {truth.size} labelled"
        raise DataError(
            "prediction-powered inference needs at least two labelled items", seen=seen, fix="label more answers"
        )
    n, total = truth.size, many.size
    spread = float(np.var(np.concatenate([many, few]), ddof=1))
    weight = 0.0
    if total and spread > 0.0:
        covariance = float(np.cov(truth, few, ddof=1)[0, 1])
        weight = min(1.0, max(0.0, covariance / ((1.0 + n / total) * spread)))
    rest = truth - weight * few
    value = float(rest.mean()) + (weight * float(many.mean()) if total else 0.0)
    variance = float(rest.var(ddof=1)) / n + (weight**2 * spread / total if total else 0.0)
    half = float(stats.t.ppf(1.0 - alpha / 2.0, n - 1)) * math.sqrt(variance)
    return Powered(value, Interval(value - half, value + half), weight)
