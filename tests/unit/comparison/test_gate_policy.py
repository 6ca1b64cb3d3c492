"""Policies: ranges, files, margins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from comparison_samples import binary_axis, continuous_axis

from trimtab.comparison import Policy, load_policy, policy_from_mapping
from trimtab.errors import DataError, UsageError


def test_defaults() -> None:
    policy = Policy()
    assert (policy.alpha, policy.power, policy.margin, policy.relative_margin) == (0.05, 0.8, 0.05, 0.05)
    assert policy.margin_for(binary_axis([1.0]), 0.5) == 0.05
    assert policy.margin_for(continuous_axis([1.0]), 2.0) == pytest.approx(math.log(1.05))
    assert policy.margin_for(continuous_axis([1.0], name="latency"), -2.0) == pytest.approx(0.1)


def test_a_flat_file(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("alpha: 0.01\nmargin.compliance: 0.02\nmargin.compliance:hard: 0.03\n", encoding="utf-8")
    policy = load_policy(file)
    assert policy.alpha == 0.01
    assert policy.margin_for(binary_axis([1.0]), 0.0) == 0.02
    assert policy.margin_for(binary_axis([1.0], name="compliance:easy"), 0.0) == 0.02
    assert policy.margin_for(binary_axis([1.0], name="compliance:hard"), 0.0) == 0.03
    assert policy.margin_for(binary_axis([1.0], name="accuracy"), 0.0) == 0.05


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("# nothing\n", encoding="utf-8")
    assert load_policy(file) == Policy()


@pytest.mark.parametrize("key", ["alhpa", "margins", "margin.", "Margin.compliance"])
def test_an_unknown_key_is_echoed_with_the_known_ones(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy_from_mapping({key: 0.05})
    assert key in str(caught.value)
    assert "max_lost" in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("value", ["0.05", True, None, [0.05], {"compliance": 0.05}])
def test_a_value_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="must be a number"):
        policy_from_mapping({"alpha": value})


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"power": 1.2},
        {"margin": 5},
        {"margin": float("nan")},
        {"relative_margin": -0.1},
        {"max_lost": 1.0},
        {"margin.compliance": 0.0},
        {"margin.compliance": float("inf")},
    ],
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        policy_from_mapping(settings)


@pytest.mark.parametrize("text", ["alpha: [", "\x00", "- 1\n- 2\n", "just words"])
def test_a_file_that_is_no_flat_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises((DataError, UsageError)):
        load_policy(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.yaml"):
        load_policy(tmp_path / "nowhere.yaml")


def test_structured_output_that_the_base_cannot_write_at_all_takes_the_margin_of_a_share() -> None:
    axis = continuous_axis([0.0], name="structeval:t")
    assert Policy(margin=0.02).margin_for(axis, 0.0) == 0.02
    assert Policy().margin_for(axis, 0.5) == pytest.approx(0.025)


def test_a_relative_margin_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"margin\.latency"):
        Policy().margin_for(continuous_axis([0.0], name="latency"), 0.0)
