"""How often the rule of the gate is wrong, by simulation with the gate's own functions."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from trimtab.comparison.statistics import PairedTable, holm, mcnemar_exact, newcombe_paired_interval

COMPARISONS, AXES, PAIRS, MARGIN, ALPHA = 2_000, 4, 100, 0.05, 0.05

interval = cache(newcombe_paired_interval)
p_value = cache(mcnemar_exact)


def holm_rows(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjustment of each row at once: statsmodels, which the gate calls once, collects garbage at each call."""
    order = np.argsort(p_values, axis=1)
    factors = np.arange(p_values.shape[1], 0, -1)
    steps = np.maximum.accumulate(np.take_along_axis(p_values, order, 1) * factors, axis=1).clip(max=1.0)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, steps, 1)
    return adjusted


def verdicts(cells: list[float], seed: int) -> tuple[float, float]:
    """Shares of comparisons with at least one regressed axis, and with every axis passed."""
    drawn = np.random.default_rng(seed).multinomial(PAIRS, cells, size=(COMPARISONS, AXES))
    tables = [[PairedTable(*axis) for axis in comparison] for comparison in drawn.tolist()]
    adjusted = holm_rows(np.array([[p_value(t.base_only, t.candidate_only) for t in row] for row in tables]))
    lower, upper = np.moveaxis(np.array([[interval(t) for t in row] for row in tables]), 2, 0)
    worse = (drawn[..., 2] - drawn[..., 1]) / PAIRS
    alarms = np.any((lower > 0) & (adjusted < ALPHA) & (worse > MARGIN), axis=1)
    return float(alarms.mean()), float(np.all(upper <= MARGIN, axis=1).mean())


def test_the_fast_holm_is_the_gates_holm() -> None:
    rows = np.random.default_rng(1).random((5, AXES)) ** 3
    assert holm_rows(rows) == pytest.approx(np.array([holm(row.tolist()) for row in rows]))


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
