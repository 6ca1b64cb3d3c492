"""Pairing: what is joined, what is reported, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comparison_samples import binary_axis, continuous_axis
from hypothesis import given
from hypothesis import strategies as st

from trimtab.comparison.pairing import pair_axes
from trimtab.errors import DataError

VALUES = st.lists(st.sampled_from([0.0, 1.0, None]), min_size=1, max_size=30)


def test_missing_and_unscored_are_reported_on_their_side() -> None:
    base, candidate = binary_axis([1.0, None, 0.0, 1.0, 0.0]), binary_axis([1.0, 0.0, None, 1.0, 0.0])
    base = replace(base, items=base.items[:4])
    candidate = replace(candidate, items=candidate.items[1:])
    found = pair_axes(base, candidate)
    assert [one.id for one, _ in found.scored] == ["item-3"]
    assert found.missing_in_base == ("item-4",)
    assert found.missing_in_candidate == ("item-0",)
    assert (found.unscored_base, found.unscored_candidate, found.lost) == (1, 1, 1)


def test_order_of_the_candidate_does_not_matter() -> None:
    base, candidate = binary_axis([1.0, 0.0, 1.0]), binary_axis([0.0, 0.0, 1.0])
    shuffled = replace(candidate, items=candidate.items[::-1])
    assert pair_axes(base, candidate) == pair_axes(base, shuffled)


@given(VALUES, VALUES)
def test_every_item_is_accounted_for(first: list[float | None], second: list[float | None]) -> None:
    found = pair_axes(binary_axis(first), binary_axis(second))
    assert len(found.scored) + len(found.unscored) + len(found.missing_in_candidate) == len(first)
    assert len(found.scored) + len(found.unscored) + len(found.missing_in_base) == len(second)
    assert all(one.id == other.id for one, other in (*found.scored, *found.unscored))
    assert all(one.value is not None and other.value is not None for one, other in found.scored)


@pytest.mark.parametrize(
    ("what", "value"),
    [("judge", "refusal-rules@2"), ("dataset", "sample@sha256:ff"), ("lower_is_better", False), ("kind", "continuous")],
)
def test_a_different_question_is_refused_and_both_sides_named(what: str, value: object) -> None:
    base = binary_axis([1.0, 0.0])
    with pytest.raises(DataError) as caught:
        pair_axes(base, replace(base, **{what: value}))
    assert what in str(caught.value)
    assert repr(getattr(base, what)) in str(caught.value)
    assert repr(value) in str(caught.value)


def test_nothing_in_common_is_never_a_pass() -> None:
    with pytest.raises(DataError, match="no item in common"):
        pair_axes(binary_axis([1.0]), binary_axis([1.0], prefix="other"))


def test_the_same_id_for_another_prompt_is_refused() -> None:
    base = binary_axis([1.0])
    other = replace(base, items=(replace(base.items[0], prompt="Something else?"),))
    with pytest.raises(DataError, match="different prompt"):
        pair_axes(base, other)


def test_a_repeated_id_is_refused() -> None:
    base = binary_axis([1.0])
    with pytest.raises(DataError, match="occurs twice in the candidate"):
        pair_axes(base, replace(base, items=base.items * 2))


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_a_binary_value_must_be_0_or_1(value: float) -> None:
    base = binary_axis([1.0])
    bad = replace(base, items=(replace(base.items[0], value=value),))
    with pytest.raises(DataError, match="not 0 or 1"):
        pair_axes(base, bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_continuous_value_must_be_finite(value: float) -> None:
    with pytest.raises(DataError, match="finite"):
        pair_axes(continuous_axis([1.0]), continuous_axis([value]))
