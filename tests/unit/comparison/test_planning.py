"""Planning: the vectorised formulas are the scalar ones, and a plan holds in a fresh simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trimtab.comparison.many import mcnemar_many, newcombe_many, wilson_many
from trimtab.comparison.planning import Assumptions, chance_to_alarm, chance_to_pass, plan
from trimtab.comparison.statistics import (
    PairedTable,
    mcnemar_exact,
    mcnemar_mid_p,
    newcombe_paired_interval,
    wilson_interval,
)
from trimtab.errors import UsageError

TABLES = np.array([[3, 1, 4, 20], [0, 0, 0, 9], [12, 0, 0, 0], [0, 5, 0, 5], [40, 7, 7, 46], [1, 0, 9, 90]])


def test_many_newcombe_is_the_gates() -> None:
    found = newcombe_many(TABLES, 0.05)
    for place, table in enumerate(TABLES.tolist()):
        expected = newcombe_paired_interval(PairedTable(*table), 0.05)
        assert (found.lower[place], found.upper[place]) == pytest.approx(expected, abs=1e-12)


def test_many_wilson_is_the_gates() -> None:
    events = np.array([0, 3, 10])
    found = wilson_many(events, 10, 0.1)
    for place, count in enumerate(events.tolist()):
        assert (found.lower[place], found.upper[place]) == pytest.approx(wilson_interval(count, 10, 0.1), abs=1e-12)


@pytest.mark.parametrize("mid_p", [False, True])
def test_many_mcnemar_is_the_gates(mid_p: bool) -> None:
    found = mcnemar_many(TABLES[:, 1], TABLES[:, 2], mid_p=mid_p)
    scalar = mcnemar_mid_p if mid_p else mcnemar_exact
    assert found.tolist() == pytest.approx([scalar(t[1], t[2]) for t in TABLES.tolist()], abs=1e-12)


def test_the_planned_number_has_the_power_and_fewer_have_not() -> None:
    assumed = Assumptions(margin=0.05, rate=0.1, flips=0.05, axes=3)
    found = plan(assumed)
    assert chance_to_pass(found.to_pass, assumed) >= 0.8 > chance_to_pass(found.to_pass * 4 // 5, assumed)
    assert chance_to_alarm(found.to_alarm, assumed, 0.1) >= 0.8 > chance_to_alarm(found.to_alarm * 4 // 5, assumed, 0.1)
    assert found.pairs == max(found.to_alarm, found.to_pass)


def test_a_worsening_of_exactly_the_margin_cannot_be_found_reliably() -> None:
    assert chance_to_alarm(5_000, Assumptions(), 0.05) < 0.6


@pytest.mark.parametrize(
    "harder", [{"margin": 0.03}, {"flips": 0.15}, {"youden": 0.7}, {"per_cluster": 5.0, "similarity": 0.5}]
)
def test_what_makes_it_harder_needs_more(harder: dict[str, float]) -> None:
    easy = Assumptions(margin=0.06, rate=0.2, flips=0.05)
    assert plan(replace(easy, **harder)).to_pass > plan(easy).to_pass


def test_the_design_effect_is_kishs() -> None:
    assert Assumptions(per_cluster=11.0, similarity=0.3).design_effect == pytest.approx(4.0)


@pytest.mark.parametrize(
    "wrong", [{"margin": 0.0}, {"rate": 1.5}, {"axes": 0}, {"youden": 0.0}, {"worsening": 0.04}, {"similarity": 2.0}]
)
def test_impossible_assumptions_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Assumptions(**wrong)  # type: ignore[arg-type]
    assert caught.value.fix


@pytest.mark.parametrize(("name", "usual"), [("alpha", "0.05"), ("power", "0.8")])
def test_an_impossible_level_is_corrected_by_a_value_that_fits_it(name: str, usual: str) -> None:
    with pytest.raises(UsageError) as caught:
        Assumptions(**{name: 2.0})  # type: ignore[arg-type]
    assert caught.value.fix == f"set {name} to, say, {usual}"


def test_an_endless_plan_is_an_error() -> None:
    with pytest.raises(UsageError, match="200,000"):
        plan(Assumptions(margin=0.0005, rate=0.5, flips=0.5))
