"""How often the rule of the gate is wrong, by simulation with the gate's own functions."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from trimtab.comparison.statistics import PairedTable, holm, mcnemar_exact, newcombe_paired_interval

COMPARISONS, AXES, PAIRS, MARGIN, ALPHA = 2_000, 4, 100, 0.05, 0.05

interval = cache(newcombe_paired_interval)
p_value = cache(mcnemar_exact)


def verdicts(cells: list[float], seed: int) -> tuple[float, float]:
    """Shares of comparisons with at least one regressed axis, and with every axis passed."""
    tables = np.random.default_rng(seed).multinomial(PAIRS, cells, size=(COMPARISONS, AXES))
    alarms = passes = 0
    for comparison in tables.tolist():
        axes = [PairedTable(*axis) for axis in comparison]
        adjusted = holm([p_value(axis.base_only, axis.candidate_only) for axis in axes])
        bounds = [interval(axis) for axis in axes]
        worse = [(axis.candidate_only - axis.base_only) / PAIRS for axis in axes]
        alarms += any(b.lower > 0 and p < ALPHA and d > MARGIN for b, p, d in zip(bounds, adjusted, worse, strict=True))
        passes += all(b.upper <= MARGIN for b in bounds)
    return alarms / COMPARISONS, passes / COMPARISONS


@pytest.mark.parametrize(
    "cells",
    [[0.05, 0.05, 0.05, 0.85], [0.40, 0.10, 0.10, 0.40], [0.01, 0.01, 0.01, 0.97]],
    ids=["rare", "frequent", "nearly none"],
)
def test_an_unchanged_model_seldom_alarms(cells: list[float]) -> None:
    alarms, _ = verdicts(cells, seed=11)
    assert alarms <= ALPHA  # two-sided test, one side alarms: half of alpha, less for the exact test


def test_a_model_that_is_worse_by_the_margin_seldom_passes() -> None:
    """At a true difference of exactly the margin a single axis passes at most about alpha / 2 of the time."""
    rng = np.random.default_rng(5)
    tables = rng.multinomial(400, [0.05, 0.03, 0.08, 0.84], size=COMPARISONS).tolist()
    passed = sum(interval(PairedTable(*table)).upper <= MARGIN for table in tables) / COMPARISONS
    assert passed <= 0.04


def test_a_clear_regression_is_found() -> None:
    alarms, passes = verdicts([0.05, 0.02, 0.30, 0.63], seed=2)
    assert alarms > 0.99
    assert passes == 0.0
