"""Approximations in training: forward they are themselves to the bit, backward their own or the exact derivative."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model

from trimtab.approximation import polynomials
from trimtab.approximation.calibration import collect
from trimtab.approximation.naming import parse
from trimtab.approximation.quantization import round_asymmetric, round_symmetric
from trimtab.approximation.sites import find_sites
from trimtab.approximation.sparsity import zero_below
from trimtab.approximation.technique import Edit, Rows, Subject
from trimtab.vetting.derivatives import straight_through, trainable_edits


@pytest.fixture(scope="module")
def subject() -> Subject:
    loaded = tiny_model()
    layers = find_sites(loaded.model)
    rows = [list(range(2, 30)), list(range(5, 40))]
    return Subject(loaded.model, layers, Rows(), lambda: collect(loaded.model, layers, rows))


def slope_of(edit: Edit, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(edit.function(x).sum(), x)[0]


def test_tables_have_the_derivative_of_what_they_stand_for(subject: Subject) -> None:
    edits = {(edit.layer, edit.site): edit for edit in trainable_edits(parse("iron"), subject)}
    assert set(edits) == {(layer, site) for layer in (0, 1) for site in ("activation", "softmax")}
    x = torch.linspace(-6.0, 6.0, 1001, dtype=torch.float64)
    gate = edits[1, "activation"]
    assert torch.equal(gate.function(x), polynomials.iron_silu(x))
    share = torch.sigmoid(x)
    torch.testing.assert_close(slope_of(gate, x), share * (1 + x * (1 - share)))
    scores = torch.linspace(-12.0, 0.0, 1001, dtype=torch.float64)
    raised = edits[1, "softmax"]
    assert torch.equal(raised.function(scores), polynomials.iron_exp_negative(-scores))
    torch.testing.assert_close(slope_of(raised, scores), scores.exp())


def test_tables_in_half_precision_too(subject: Subject) -> None:
    (gate, *_) = trainable_edits(parse("iron:softmax=no"), subject)
    x = torch.linspace(-3.0, 3.0, 101).bfloat16()
    assert torch.equal(gate.function(x), polynomials.iron_silu(x.float()).bfloat16())
    assert float(slope_of(gate, x).min()) < 0.0 < 1.0 < float(slope_of(gate, x).max())


@pytest.mark.parametrize(
    "name",
    [
        *("bolt", "bolt:port=refit", "bumblebee", "puma", "nexus", "nexus:norm=yes", "nexus:port=refit"),
        *("cats:0.3", "cats:0.99", "teal:0.3", "teal:0.99", "noise:up=0.1,down=0.2"),
    ],
)
def test_what_has_a_derivative_keeps_its_own(name: str, subject: Subject) -> None:
    techniques = parse(name)
    given: list[Edit] = []

    class Kept:
        """The technique, its edits remembered: they are made anew at every call."""

        def __getattr__(self, key: str) -> object:
            return getattr(techniques[0], key)

        def edits(self, subject: Subject) -> list[Edit]:
            given.extend(techniques[0].edits(subject))
            return given

    found = trainable_edits([Kept()], subject)  # type: ignore[list-item]
    assert given
    assert all(one is other for one, other in zip(found, given, strict=True))


@pytest.mark.parametrize("name", ["a3", "a8", "a8:grid=full", "smoothquant:4", "omniquant:2,steps=1", "kv2", "kv8"])
def test_rounding_passes_gradients_straight_through(name: str, subject: Subject) -> None:
    (technique,) = parse(name)
    rounded = technique.edits(subject)
    for edit, plain in zip(trainable_edits([technique], subject), rounded, strict=True):
        layer = subject.layers[edit.layer]
        width = {"down": layer.down.in_features, "query": 8, "key": 8, "value": 8}.get(edit.site, 32)  # type: ignore[union-attr]
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
        assert torch.equal(edit.function(x), plain.function(x))
        assert torch.equal(slope_of(edit, x), torch.ones_like(x))


def test_sparsity_is_no_rounding_wherever_it_begins() -> None:
    """At a threshold within the tried numbers, at their edge and beyond it, where it gives nothing but 0."""
    for limit in (0.01, 0.5, 1.5, 1.9, 1.99, 2.0, 2.03, 3.0, 100.0):
        edit = Edit(0, "up", zero_below(limit, 1.0, Rows()))
        assert straight_through(edit) is edit


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_rounding_is_told_at_any_width(bits: int) -> None:
    for function in (round_symmetric, round_asymmetric):
        edit = Edit(0, "up", lambda x, function=function: function(x, bits))  # type: ignore[misc]
        assert straight_through(edit) is not edit
