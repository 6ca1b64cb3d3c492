"""How many prompts a margin needs, before anything is run.

Covered: the number of pairs at which the gate raises its alarm for a given worsening, and at which it passes a model
that did not change, on one axis among several; the price of a judge that errs and of prompts that resemble each other.
Not covered: continuous axes (their spread is not known beforehand), the cost of a model in seconds.

Both numbers come from the gate's own rule, simulated. A worsening of exactly the margin can never be found reliably,
since the alarm asks for more than the margin; so the plan is made for a larger one, by default twice the margin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from trimtab.comparison.many import mcnemar_many, newcombe_many
from trimtab.comparison.statistics import check_level
from trimtab.errors import UsageError

_DRAWS = 4_000  # simulated comparisons for each size: a power of 0.8 is then known to about a point
_SEED = 20_260_102
_MOST_PAIRS = 200_000


@dataclass(frozen=True)
class Assumptions:
    """What must be assumed before there are data.

    Attributes:
        margin: how much worse is tolerated, as a share, in (0, 1).
        rate: rate of the event in the base, in [0, 1].
        flips: share of items that change although nothing changed, in [0, 2 min(rate, 1 - rate)].
        axes: how many axes are compared together (Holm's first step divides alpha by it).
        alpha, power: error rates.
        youden: sensitivity + specificity - 1 of the judge, in (0, 1]; 1 is a judge that never errs.
        per_cluster: prompts of one family or category, >= 1. similarity: correlation of the changes within it, [0, 1].
        worsening: true worsening that must raise the alarm, as a share above the margin; None is twice the margin.
    """

    margin: float = 0.05
    rate: float = 0.1
    flips: float = 0.05
    axes: int = 1
    alpha: float = 0.05
    power: float = 0.8
    youden: float = 1.0
    per_cluster: float = 1.0
    similarity: float = 0.0
    worsening: float | None = None

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        check_level("power", self.power)
        share = "give a share, not points: "
        for name, good, wanted, fix in (
            ("margin", 0.0 < self.margin < 1.0, "strictly between 0 and 1", share + "0.05 is 5 points"),
            ("rate", 0.0 <= self.rate <= 1.0, "between 0 and 1", share + "0.1 is 10 in a hundred"),
            ("flips", 0.0 <= self.flips <= 1.0, "between 0 and 1", share + "0.05 is 5 in a hundred"),
            ("axes", self.axes >= 1, "at least 1", "count the axes that are compared together"),
            ("youden", 0.0 < self.youden <= 1.0, "above 0 and at most 1", "give 1 for a judge that never errs"),
            ("per_cluster", self.per_cluster >= 1.0, "at least 1", "give 1 for prompts that stand alone"),
            ("similarity", 0.0 <= self.similarity <= 1.0, "between 0 and 1", "give 0 for prompts that stand alone"),
            (
                "worsening",
                self.margin < self.alarming <= 1.0,
                "above the margin and at most 1",
                "leave it out, or raise it",
            ),
        ):
            if not good:
                raise UsageError(f"{name} must be {wanted}", seen=getattr(self, name), fix=fix)

    @property
    def alarming(self) -> float:
        """The worsening that must raise the alarm."""
        return self.worsening if self.worsening is not None else min(1.0, 2.0 * self.margin)

    @property
    def design_effect(self) -> float:
        """How many times more prompts families of similar prompts need. Source: Kish 1965, Survey Sampling."""
        return 1.0 + (self.per_cluster - 1.0) * self.similarity


class Plan(NamedTuple):
    """Prompts on one axis: to raise the alarm for a real worsening; to pass when nothing changed."""

    to_alarm: int
    to_pass: int
    assumptions: Assumptions

    @property
    def pairs(self) -> int:
        """Enough for both."""
        return max(self.to_alarm, self.to_pass)


def plan(assumptions: Assumptions) -> Plan:
    """Numbers of prompts that both questions need.

    A judge with Youden index J shows only J of a true difference, so margin and worsening shrink by J; families of
    similar prompts multiply the result by the design effect.

    Raises:
        UsageError: where more than 200,000 prompts would be needed.
    """
    share = assumptions.youden
    seen = replace(assumptions, margin=assumptions.margin * share, worsening=assumptions.alarming * share, youden=1.0)
    alarm = _smallest(lambda pairs: chance_to_alarm(pairs, seen, seen.alarming), seen)
    stay = _smallest(lambda pairs: chance_to_pass(pairs, seen), seen)
    effect = assumptions.design_effect
    return Plan(int(np.ceil(alarm * effect)), int(np.ceil(stay * effect)), assumptions)


def chance_to_alarm(pairs: int, assumptions: Assumptions, worse_by: float) -> float:
    """Chance that an axis of so many pairs regresses when it is worse by ``worse_by``, in [0, 1], by simulation."""
    tables = np.random.default_rng(_SEED).multinomial(pairs, _cells(assumptions, worse_by), size=_DRAWS)
    base_only, candidate_only = tables[:, 1], tables[:, 2]
    significant = mcnemar_many(base_only, candidate_only) < assumptions.alpha / assumptions.axes
    beyond = (candidate_only - base_only) / pairs > assumptions.margin
    return float(np.mean(significant & beyond & (newcombe_many(tables, assumptions.alpha).lower > 0.0)))


def chance_to_pass(pairs: int, assumptions: Assumptions, worse_by: float = 0.0) -> float:
    """Chance that an axis of so many pairs passes, in [0, 1], by simulation with a fixed seed.

    Args:
        worse_by: true worsening as judged, in [0, 1): 0 for a model that did not change, the margin for a false pass.
    """
    tables = np.random.default_rng(_SEED).multinomial(pairs, _cells(assumptions, worse_by), size=_DRAWS)
    return float(np.mean(newcombe_many(tables, assumptions.alpha).upper <= assumptions.margin))


def _smallest(chance: Callable[[int], float], assumptions: Assumptions) -> int:
    """Smallest number of pairs (to about 2 %) at which a chance reaches the wanted power."""
    low, high = 1, 16
    while chance(high) < assumptions.power:
        low, high = high, high * 2
        if high > _MOST_PAIRS:
            fix = "widen the margin, or expect fewer flips (greedy decoding, a better judge)"
            raise UsageError("a margin this small needs more than 200,000 prompts", seen=assumptions.margin, fix=fix)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= assumptions.power else (middle, high)
    return high


def _cells(assumptions: Assumptions, worse_by: float) -> list[float]:
    """Chances of the four outcomes of a pair; the flips are limited to what the rate allows."""
    rate = min(assumptions.rate, 1.0 - assumptions.rate)
    half = min(assumptions.flips / 2.0, rate if rate > 0.0 else 0.0)
    base_only, candidate_only = half, half + worse_by
    both = max(0.0, assumptions.rate - base_only)
    neither = 1.0 - both - base_only - candidate_only
    if neither < -1e-12:
        raise UsageError(
            "rate, flips and worsening together exceed 1",
            seen=(assumptions.rate, assumptions.flips),
            fix="lower one of them",
        )
    return [both, base_only, candidate_only, max(0.0, neither)]
