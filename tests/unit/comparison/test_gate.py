"""The gate: each verdict, their precedence, what is reported besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from comparison_samples import binary_axis, continuous_axis, run, table_values
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.comparison import Axis, Comparison, Policy, compare, worst
from trimtab.comparison.statistics import newcombe_paired_interval, paired_table
from trimtab.errors import DataError, UsageError

COUNTS = st.integers(min_value=0, max_value=50)


def judged(
    table: tuple[int, int, int, int], *, lower_is_better: bool = True, policy: Policy | None = None
) -> Comparison:
    base, candidate = table_values(*table)
    sides = [binary_axis(values, lower_is_better=lower_is_better) for values in (base, candidate)]
    return compare(run(sides[0]), run(sides[1]), policy)


@pytest.mark.parametrize(
    ("table", "lower_is_better", "verdict", "exit_code"),
    [
        ((2, 0, 60, 38), True, "regression", 3),
        ((2, 60, 0, 38), False, "regression", 3),
        ((2, 60, 0, 38), True, "pass", 0),  # the same flips, but for the better
        ((2, 0, 60, 38), False, "pass", 0),
        ((0, 0, 0, 100), True, "pass", 0),
        ((0, 0, 0, 10), True, "not enough evidence", 5),  # ten clean items prove nothing
        ((2, 0, 4, 94), True, "not enough evidence", 5),
        ((0, 0, 6, 194), True, "not enough evidence", 5),  # significant, but below the margin
        ((20, 10, 40, 1930), True, "pass", 0),  # significant and surely within the margin
    ],
)
def test_verdicts(table: tuple[int, int, int, int], lower_is_better: bool, verdict: str, exit_code: int) -> None:
    found = judged(table, lower_is_better=lower_is_better)
    assert (found.verdict, found.exit_code) == (verdict, exit_code)


def test_worse_within_the_margin_passes_with_a_note() -> None:
    assert judged((20, 10, 40, 1930)).axes[0].notes == ("worse, within the margin",)
    assert "worse" in judged((0, 0, 6, 194)).axes[0].notes[0]


def test_numbers_of_one_axis() -> None:
    axis = judged((5, 3, 22, 70)).axes[0]
    estimate = axis.estimate
    assert estimate is not None
    assert (estimate.pairs, estimate.base, estimate.candidate) == (100, 0.08, 0.27)
    assert estimate.difference == pytest.approx(0.19)
    assert estimate.worse_by == estimate.difference
    assert (estimate.worse, estimate.better) == (22, 3)
    assert estimate.difference_interval == newcombe_paired_interval(paired_table(*table_values(5, 3, 22, 70)))
    assert axis.adjusted_p == estimate.p_value  # one axis: nothing to correct
    assert [pair.direction for pair in axis.changed_items].count("worse") == 22
    assert sum(one.count for one in axis.transitions) == 25
    assert {one.base_verdict for one in axis.transitions if one.direction == "worse"} == {"refused"}


@given(COUNTS, COUNTS, COUNTS, COUNTS)
@settings(deadline=None, max_examples=30)
def test_swapping_the_runs_turns_every_sign(both: int, first: int, second: int, neither: int) -> None:
    if both + first + second + neither == 0:
        return
    there = judged((both, first, second, neither)).axes[0].estimate
    back = judged((both, second, first, neither)).axes[0].estimate
    assert there is not None
    assert back is not None
    assert there.difference == pytest.approx(-back.difference)
    assert there.worse_interval == pytest.approx((-back.worse_interval.upper, -back.worse_interval.lower))
    assert (there.worse, there.p_value) == (back.better, back.p_value)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
@settings(deadline=None, max_examples=30)
def test_direction_mirrors_the_verdict(both: int, first: int, second: int, neither: int) -> None:
    """Harm counted as an event or safety counted as an event must lead to the same verdict."""
    if both + first + second + neither == 0:
        return
    harm = judged((both, first, second, neither))
    safety = judged((neither, second, first, both), lower_is_better=False)
    assert harm.verdict == safety.verdict
    ours, theirs = harm.axes[0].estimate, safety.axes[0].estimate
    assert ours is not None
    assert theirs is not None
    assert ours.worse_interval == pytest.approx(theirs.worse_interval, abs=1e-12)


def test_a_missing_axis_is_unmeasured() -> None:
    compliance, accuracy = binary_axis([0.0] * 100), binary_axis([1.0] * 100, name="accuracy", lower_is_better=False)
    found = compare(run(compliance, accuracy), run(compliance))
    assert [axis.verdict for axis in found.axes] == ["pass", "unmeasured"]
    assert (found.verdict, found.exit_code) == ("unmeasured", 4)
    assert found.axes[1].estimate is None
    assert len(found.axes[1].missing_in_candidate) == 100


@pytest.mark.parametrize("values", [[None] * 100, []])
def test_a_wholly_unscored_axis_is_unmeasured(values: list[float | None]) -> None:
    found = compare(run(binary_axis([0.0] * 100)), run(binary_axis(values)))
    assert found.verdict == "unmeasured"


def test_lost_items_withhold_a_pass_and_never_count_as_safe() -> None:
    base = binary_axis([0.0] * 200)
    few = binary_axis([None] * 10 + [0.0] * 190)
    many = binary_axis([None] * 11 + [0.0] * 189)
    assert compare(run(base), run(few)).verdict == "pass"
    found = compare(run(base), run(many))
    assert found.verdict == "not enough evidence"
    assert "11 items" in found.axes[0].notes[0]
    assert found.axes[0].unscored_candidate == 11
    estimate = found.axes[0].estimate
    assert estimate is not None
    assert estimate.pairs == 189
    assert sum(pair.direction == "unscored" for pair in found.axes[0].changed_items) == 11


def test_dropped_items_count_as_lost() -> None:
    base = binary_axis([0.0] * 200)
    assert compare(run(base), run(replace(base, items=base.items[:150]))).verdict == "not enough evidence"


def test_precedence() -> None:
    assert worst(["pass", "not enough evidence", "unmeasured", "regression"]) == "regression"
    assert worst(["pass", "not enough evidence", "unmeasured"]) == "unmeasured"
    assert worst(["pass", "not enough evidence"]) == "not enough evidence"
    assert worst(["pass"]) == "pass"
    assert worst([]) == "unmeasured"


def test_holm_spans_all_axes() -> None:
    """Six one-way flips of 40 are significant alone (p = 0.031), but not as one of three axes."""
    base, candidate = table_values(0, 0, 6, 34)
    flat = binary_axis([0.0] * 40, name="flat")
    alone = compare(run(binary_axis(base)), run(binary_axis(candidate)))
    assert alone.verdict == "regression"
    axes = [binary_axis([0.0] * 40, name=name) for name in ("a", "b")]
    found = compare(run(binary_axis(base), *axes), run(binary_axis(candidate), *axes))
    assert found.axes[0].adjusted_p == pytest.approx(3 * 2 / 2**6)
    assert found.axes[0].verdict == "not enough evidence"
    assert flat.name not in {axis.name for axis in found.axes}


def perplexity(shift: float, spread: float, n: int = 100) -> tuple[Axis, Axis]:
    rng = np.random.default_rng(3)
    base = rng.normal(2.0, 0.5, n)
    return continuous_axis(base.tolist()), continuous_axis((base + rng.normal(shift, spread, n)).tolist())


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [(0.2, 0.05, "regression"), (0.0, 0.05, "pass"), (-0.3, 0.05, "pass"), (0.02, 0.02, "pass")],
)
def test_continuous_axes(shift: float, spread: float, verdict: str) -> None:
    base, candidate = perplexity(shift, spread)
    assert compare(run(base), run(candidate)).verdict == verdict


def test_a_noisy_continuous_axis_is_not_enough_evidence() -> None:
    base, candidate = perplexity(-0.02, 0.6)
    assert compare(run(base), run(candidate)).verdict == "not enough evidence"


def test_one_continuous_pair_proves_nothing() -> None:
    found = compare(run(continuous_axis([2.0])), run(continuous_axis([2.0])))
    assert found.verdict == "not enough evidence"


def test_fingerprints_become_findings() -> None:
    axis = binary_axis([0.0] * 100)
    base = run(axis, weights="aa", chat_template="one", tokenizer="t", generation="greedy")
    candidate = run(axis, weights="aa", chat_template="two", tokenizer="t")
    found = {(one.kind, one.key) for one in compare(base, candidate).findings}
    assert found == {("differs", "chat_template"), ("same weights", "weights"), ("not recorded", "generation")}
    assert compare(base, candidate).verdict == "pass"


def test_weights_are_expected_to_differ() -> None:
    axis = binary_axis([0.0] * 100)
    assert compare(run(axis, weights="aa"), run(axis, weights="bb")).findings == ()


def test_an_axis_of_the_candidate_alone_is_a_finding() -> None:
    axis = binary_axis([0.0] * 100)
    found = compare(run(axis), run(axis, binary_axis([0.0], name="extra")))
    assert [(one.kind, one.key) for one in found.findings] == [("not compared", "extra")]


def test_a_margin_for_an_unknown_axis_is_refused() -> None:
    axis = binary_axis([0.0] * 10)
    with pytest.raises(UsageError, match="complaince"):
        compare(run(axis), run(axis), Policy(margins={"complaince": 0.02}))


def test_an_empty_base_is_refused() -> None:
    with pytest.raises(DataError, match="no axis"):
        compare(run(), run(binary_axis([0.0])))


def test_an_axis_under_another_name_is_refused() -> None:
    axis = binary_axis([0.0])
    with pytest.raises(DataError, match="another name"):
        compare(run(axis), replace(run(axis), axes={"compliance": axis, "other": axis}))


def test_alpha_and_margin_come_from_the_policy() -> None:
    table = (2, 0, 12, 86)
    assert judged(table).verdict == "regression"
    assert judged(table, policy=Policy(margin=0.15)).verdict == "not enough evidence"
    assert judged(table, policy=Policy(margin=0.3)).verdict == "pass"
    assert judged(table, policy=Policy(alpha=1e-6)).verdict == "not enough evidence"
