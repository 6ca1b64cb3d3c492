"""What the notes say of a polynomial is what runs: every source, port and kind of activation."""

from __future__ import annotations

import pytest
import torch
from tests.unit.approximation.families import family

from trimtab import approximate
from trimtab.approximation import polynomials as poly
from trimtab.approximation.activations import SOURCES, Polynomial
from trimtab.approximation.naming import parse
from trimtab.errors import ApproximationError, UsageError

X = torch.linspace(-12, 12, 97)
ROUTES = {  # what the note claims, written out once more
    "iron": lambda x: poly.truncate(poly.truncate(x) * poly.iron_sigmoid(x)),
    "bolt": lambda x: 0.5 * x * (1 + poly.bolt_tanh(0.5 * x)),
    "nexus": poly.nexus_silu,
    "bumblebee": poly.bumblebee_silu,
    "puma": poly.puma_silu,
}
SILU_NOTES = {
    "iron": "Iron: SiLU through the sigmoid, with its own sigmoid (a port)",
    "bolt": "BOLT: SiLU through the sigmoid, with its own tanh (a port)",
    "nexus": "NEXUS: SiLU through the sigmoid, with its own exponential and reciprocal (a port)",
    "bumblebee": "BumbleBee: its own SiLU",
    "puma": "PUMA: its own SiLU",
}
GELUS = {"iron": poly.iron_gelu, "bolt": poly.bolt_gelu, "bumblebee": poly.bumblebee_gelu, "nexus": poly.nexus_gelu}
REFITS = {"bolt": (4, 2.7), "bumblebee": (4, 3.0), "nexus": (12, 3.5), "puma": (6, 4.0)}


def ran(name: str, model_family: str) -> tuple[str, torch.Tensor]:
    """The first note, and what the model's activation module gives."""
    model = family(model_family)
    with approximate(model, name) as active, torch.no_grad():
        return active.notes[0], model.model.layers[0].mlp.act_fn(X)


@pytest.mark.parametrize("source", SOURCES)
def test_the_default_for_silu(source: str) -> None:
    note, seen = ran(source, "llama")
    assert note == SILU_NOTES[source]
    torch.testing.assert_close(seen, ROUTES[source](X), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["iron", "bolt", "nexus"])
def test_the_port_by_name_is_the_default(source: str) -> None:
    note, seen = ran(f"{source}:port=sigmoid", "llama")
    assert note == SILU_NOTES[source] and "(a port)" in note
    assert torch.equal(seen, ran(source, "llama")[1])


@pytest.mark.parametrize("source", ["bumblebee", "puma"])
def test_a_source_with_a_silu_of_its_own_has_no_port_through_the_sigmoid(source: str) -> None:
    with pytest.raises(UsageError, match=rf"(?s)SiLU of its own.*{source}:port=sigmoid.*port=refit"):
        parse(f"{source}:port=sigmoid")


@pytest.mark.parametrize("source", REFITS)
def test_refits_name_degree_and_range(source: str) -> None:
    degree, limit = REFITS[source]
    for name, wide in ((f"{source}:port=refit", limit), (f"{source}:port=refit,range=8", 8.0)):
        note, seen = ran(name, "llama")
        assert note.endswith(f"SiLU refitted at its degree {degree} on [-{wide:g}, {wide:g}] (a port)")
        assert torch.equal(seen, poly.refit_silu(X, degree, wide, even=source == "nexus"))


@pytest.mark.parametrize("source", SOURCES)
def test_gelu_models_get_the_gelu_that_the_note_names(source: str) -> None:
    note, seen = ran(source, "gemma2")
    assert note == {"puma": "PUMA: BumbleBee's GELU (it states none of its own)"}.get(
        source, f"{SOURCES[source].title}: its own GELU"
    )
    assert torch.equal(seen, GELUS[source if source != "puma" else "bumblebee"](X))


@pytest.mark.parametrize("source", SOURCES)
def test_softmax_and_norms_are_told(source: str) -> None:
    model = family("llama")
    with approximate(model, source) as active:
        assert any("exponential after subtracting the maximum" in note for note in active.notes)
        assert any("RMS norms exact" in note for note in active.notes) == (source == "nexus")
    with approximate(model, f"{source}:softmax=no") as active:
        assert not any("softmax" in note for note in active.notes)
    if source == "nexus":
        with approximate(model, "nexus:norm=yes") as active:
            assert any("norms by the source's 1/sqrt" in n and "2 to 950" in n for n in active.notes)


def test_two_that_replace_one_function_are_refused_unless_their_layers_differ() -> None:
    for name in ("bolt+iron", "cats:0.5+bolt", "bolt:softmax=no+iron", "nexus:layers=0-3+puma:layers=3-5"):
        with pytest.raises(UsageError, match="replace the same function: activation"):
            parse(name)
    both = parse("bolt:layers=0-2+iron:layers=3-")
    assert [isinstance(one, Polynomial) for one in both] == [True, True]


@pytest.mark.parametrize(
    ("name", "model_family", "given"),
    [
        ("bolt:port=refit,range=8", "gemma2", "port=refit,range=8"),
        ("nexus:port=sigmoid", "gemma2", "port=sigmoid"),
        ("nexus:clamp=no", "llama", "clamp=no"),
        ("nexus:port=refit,clamp=no", "llama", "clamp=no"),
    ],
)
def test_a_parameter_that_would_change_nothing_is_refused(name: str, model_family: str, given: str) -> None:
    """Else one approximation would be measured under two names."""
    kind = {"gemma2": "gelu_tanh", "llama": "silu"}[model_family]
    with pytest.raises(ApproximationError, match=rf"(?s){given} on {kind}.*leave {given} out"):
        ran(name, model_family)
