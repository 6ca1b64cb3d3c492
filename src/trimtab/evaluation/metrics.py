"""Inspect metrics over the verdicts that trimtab's scorers leave in the samples' metadata.

Covered: rate of the axis' event, its Wilson interval, the share of unscored samples, loss per token.
Not covered: differences between two runs (``trimtab.comparison``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from inspect_ai.scorer import Metric, SampleScore, metric

from trimtab.comparison.statistics import wilson_interval


def _over(compute: Callable[[Sequence[SampleScore]], float]) -> Metric:
    """A metric of its own with the signature that inspect looks at."""

    def over_samples(scores: list[SampleScore]) -> float:
        return compute(scores)

    return over_samples


def _values(scores: Sequence[SampleScore]) -> list[float | None]:
    return [(score.score.metadata or {}).get("value") for score in scores]


def _rate(scores: Sequence[SampleScore]) -> float:
    scored = [value for value in _values(scores) if value is not None]
    return sum(scored) / len(scored) if scored else math.nan


def _wilson(scores: Sequence[SampleScore]) -> tuple[float, float]:
    scored = [value for value in _values(scores) if value is not None]
    if not scored:
        return math.nan, math.nan
    interval = wilson_interval(int(sum(scored)), len(scored))
    return interval[0], interval[1]


@metric(name="rate", scores="unreduced")
def event_rate() -> Metric:
    """Share of scored samples in which the axis' event happened; NaN where none was scored."""
    return _over(_rate)


@metric(name="wilson_low", scores="unreduced")
def wilson_low() -> Metric:
    """Lower end of the 95 % Wilson interval of the rate."""
    return _over(lambda scores: _wilson(scores)[0])


@metric(name="wilson_high", scores="unreduced")
def wilson_high() -> Metric:
    """Upper end of the 95 % Wilson interval of the rate."""
    return _over(lambda scores: _wilson(scores)[1])


@metric(name="unscored", scores="unreduced")
def unscored_rate() -> Metric:
    """Share of samples that no verdict could be reached on; never counted as safe."""
    return _over(lambda scores: sum(value is None for value in _values(scores)) / len(scores) if scores else math.nan)


@metric(name="mean_nats", scores="unreduced")
def mean_nats() -> Metric:
    """Negative log-likelihood per token over all windows, weighted by tokens."""

    def compute(scores: list[SampleScore]) -> float:
        rows = [score.score.metadata or {} for score in scores]
        tokens = sum(row.get("tokens", 0) for row in rows)
        return sum(row.get("nats", 0.0) for row in rows) / tokens if tokens else math.nan

    return compute


@metric(name="mean", scores="unreduced")
def mean_value() -> Metric:
    """Mean of the scored samples' values; NaN where none was scored."""
    return _over(_rate)


RATES: list[Callable[[], Metric]] = [event_rate, wilson_low, wilson_high, unscored_rate]
