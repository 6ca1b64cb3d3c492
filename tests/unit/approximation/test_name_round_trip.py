"""A label is the string that makes the same technique again, whatever its numbers; what may stand beside what."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trimtab.approximation import naming
from trimtab.approximation.entries import Entry, LayerRange, Parameter, number
from trimtab.approximation.noise import Noise
from trimtab.errors import UsageError

ENTRIES = naming.entries()
LAYERS = st.builds(
    lambda first, more: LayerRange(first, None if more is None else first + more),
    st.integers(0, 99),
    st.none() | st.integers(0, 99),
)


def values(rule: Parameter) -> st.SearchStrategy[Any]:
    if rule.kind is LayerRange:
        return LAYERS
    if rule.choices:
        return st.sampled_from(rule.choices)
    if rule.kind is int:
        return st.integers(math.ceil(rule.low), math.floor(rule.high))
    return st.floats(
        rule.low,
        rule.high if math.isfinite(rule.high) else None,
        exclude_min=rule.open_low,
        exclude_max=rule.open_high,
        allow_infinity=False,
        allow_nan=False,
        allow_subnormal=False,
    )


@st.composite
def techniques(draw: st.DrawFn, name: str) -> Any:
    """A technique with any of its parameters given; combinations that it refuses are passed over."""
    entry: Entry = ENTRIES[name]
    given_values = {
        key: draw(values(rule)) if rule.required or draw(st.booleans()) else rule.default
        for key, rule in entry.parameters.items()
    }
    try:
        return entry.make(**given_values, **entry.fixed)
    except UsageError:
        assume(False)


@pytest.mark.parametrize("name", ENTRIES)
@given(data=st.data())
def test_every_label_parses_to_its_technique(name: str, data: st.DataObject) -> None:
    technique = data.draw(techniques(name))
    assert naming.parse(technique.label) == (technique,)
    beside = "kv3" if name == "noise" else "noise:up=1e+3"
    assert naming.parse(f"{technique.label}+{beside}") == (technique, *naming.parse(beside))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_reads_back_and_joins_nothing(value: float) -> None:
    text = number(value)
    assert float(text) == value and "+" not in text


def test_usual_labels_are_the_published_ones() -> None:
    for name, label in {
        "teal:0.5": "teal:share=0.5,prefill=0.5",
        "teal:0.9,prefill=1": "teal:share=0.9,prefill=1",
        "noise:up=0.05,down=0.0625,layers=0-3": "noise:up=0.05,down=0.0625,seed=0,layers=0-3",
        "smoothquant:4": "smoothquant:bits=4,alpha=0.85",
        "bolt:port=refit,range=8": "bolt:port=refit,range=8",
        "cats:0.00001": "cats:share=1e-05",
        "a8": "a8",
    }.items():
        assert naming.parse(name)[0].label == label


def test_large_numbers_and_many_digits_are_kept() -> None:
    for text, up in (("1e+3", 1e3), ("1E+06", 1e6), ("1000000", 1e6), ("0.12345678901", 0.12345678901), ("2.e+5", 2e5)):
        (noise,) = naming.parse(f"noise:up={text}")
        assert isinstance(noise, Noise) and noise.up == up
        assert naming.parse(noise.label) == (noise,)
    both = naming.parse("noise:up=1e+3+a8")
    assert [one.label for one in both] == ["noise:up=1000,seed=0", "a8"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a8+a8", "rounding twice at the same place: attn_in, attn_out, down, up"),
        ("a8+a4", "rounding twice at the same place"),
        ("a8+bolt+smoothquant:8", "rounding twice"),
        ("a8:layers=0-4+omniquant:8,layers=4-", "rounding twice"),
        ("omniquant:4+kv8", "rounding twice at the same place: key, value"),
        ("kv8+kv4", "rounding twice at the same place: key, value"),
        ("teal:0.5+teal:0.25", "zeroing twice"),
        ("teal:0.5,layers=0-3+teal:0.25,layers=3-", "zeroing twice"),
        ("noise:up=0.1+noise:up=0.2,seed=1", "noise twice"),
        ("cats:0.5+cats:0.25", "replace the same function: activation"),
    ],
)
def test_one_kind_of_thing_is_done_once_at_a_place(name: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        naming.parse(name)
    text = str(caught.value)
    assert what in text and " and " in text and "different layers" in text


@pytest.mark.parametrize(
    "name",
    [
        "teal:0.5,layers=0-3+teal:0.25,layers=4-",
        "a8:layers=0-3+a4:layers=4-",
        "a8:layers=2-2+smoothquant:8,layers=0-1+a8:layers=3-",
        "noise:up=0.1,layers=0-3+noise:up=0.2,layers=4-",
        "cats:0.5,layers=0-1+cats:0.25,layers=2-",
        "kv8:layers=0-1+kv4:layers=2-",
        "a8+kv8",
        "teal:0.5+a8",
        "teal:0.5+cats:0.5",
        "bolt:layers=0-3+iron:layers=4-",
    ],
)
def test_other_places_other_layers_and_other_kinds_are_composed(name: str) -> None:
    found = naming.parse(name)
    assert len(found) == name.count("+") + 1
    assert naming.parse("+".join(one.label for one in found)) == found


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if any(
    rule.required for rule in entry.parameters.values()
)])  # fmt: skip
def test_the_example_in_a_message_is_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="needs") as caught:
        naming.parse(name)
    example = caught.value.fix.removeprefix("write, say, ")
    assert naming.parse(example)[0].label.startswith(name)
