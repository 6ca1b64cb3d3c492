"""Polynomials in half precision are those of double precision, rounded once: activations, exponentials, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor

from trimtab.approximation import approximate
from trimtab.approximation import polynomials as poly
from trimtab.approximation.activations import SOURCES, Polynomial
from trimtab.approximation.apply import install
from trimtab.approximation.attention import softmax_by
from trimtab.approximation.naming import parse
from trimtab.approximation.ranges import Guarded
from trimtab.approximation.sites import find_sites
from trimtab.approximation.technique import Edit, Rows, Subject

HALVES = (torch.bfloat16, torch.float16)
KINDS = {"silu": "llama", "gelu_tanh": "gemma2"}
NAMES = [
    "iron",
    "bolt",
    "bumblebee",
    "nexus",
    "puma",
    "bolt:port=refit",
    "bolt:port=refit,range=16",
    "nexus:port=refit",
]
RUNS = [(name, kind) for name in NAMES for kind in KINDS if "port" not in name or kind == "silu"]


def edits(name: str, model: Any) -> list[Edit]:
    (technique,) = parse(name)
    subject = Subject(model, find_sites(model), Rows(), lambda: None)  # type: ignore[arg-type, return-value]
    return list(technique.edits(subject))


def places(dtype: torch.dtype) -> Tensor:
    """Small, middling, and as far as a model's activations go in that type."""
    far = torch.tensor([-3e4, -2000.0, -300.0, -40.0, 40.0, 300.0, 2000.0, 3e4])
    return torch.cat([torch.linspace(-20, 20, 4001), far]).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_an_activation_in_half_precision_is_the_reference_rounded_once(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    x = places(dtype)
    activation = next(edit for edit in edits(name, family(KINDS[kind])) if edit.site == "activation").function
    seen = activation(x)
    (technique,) = parse(name)
    assert isinstance(technique, Polynomial)
    reference = technique.activation(kind)[0](x.double())
    assert seen.dtype == dtype
    steps = {"iron": 3 * 2.0**-12}.get(name, 1e-4)  # Iron rounds down to 12 bits: the last may fall on either side
    single = 2.0**-24 * x.double().abs()  # float32's own error: what is multiplied with x is 0 only to that
    assert bool(((seen.double() - reference).abs() <= torch.finfo(dtype).eps * reference.abs() + steps + single).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_the_softmax_in_half_precision_is_the_reference(source: str, dtype: torch.dtype) -> None:
    model = family("llama")
    exp = next(edit for edit in edits(source, model) if edit.site == "softmax").function
    scores = (torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    scores[0, 0, 20:] = torch.finfo(dtype).min
    seen = softmax_by(exp, scores)
    raised = SOURCES[source].exp((scores.double() - scores.double().amax(-1, keepdim=True)).clamp_min(-100.0))
    raised[0, 0, 20:] = 0.0
    torch.testing.assert_close(seen.double(), raised / raised.sum(-1, keepdim=True), rtol=1e-3, atol=3e-4)
    masked = torch.full((1, 4), -torch.inf, dtype=dtype)  # padding: scores below the type's minimum
    assert torch.equal(softmax_by(exp, masked), torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_norm_in_half_precision_is_the_reference(name: str, dtype: torch.dtype) -> None:
    model = family(name).to(dtype)
    layers = find_sites(model)
    x = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    norm = layers[0].norms[0]
    with torch.no_grad():
        exact = norm(x)
        undo = install(model, layers, [edit for edit in edits("nexus:norm=yes", model) if edit.site == "norm"], Rows())
        seen = norm(x)
        undo()
        assert torch.equal(norm(x), exact)
    squares = x.double().square().sum(-1, keepdim=True)
    reference = x.double() * 32**0.5 * poly.nexus_inverse_root(squares)
    torch.testing.assert_close(seen.double(), reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family_name", ["llama", "gemma2"])
@pytest.mark.parametrize("name", [*SOURCES, "nexus:norm=yes"])
def test_a_whole_model_in_half_precision_stays_finite_and_near(name: str, family_name: str, dtype: torch.dtype) -> None:
    ids = torch.tensor(token_rows(2, 10))
    model = family(family_name)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(40.0 if family_name == "llama" else 7.0)  # sums of squares near 20
        model.get_input_embeddings().weight[0] = 1.0
        with approximate(model, name):
            full = model(input_ids=ids).logits
        model.to(dtype)
        exact = model(input_ids=ids).logits
        with approximate(model, name):
            half = model(input_ids=ids).logits
    assert torch.isfinite(half).all() and half.dtype == exact.dtype
    assert float((half.float() - full).abs().max()) < 0.05 * float(full.abs().max())


def test_in_float32_and_float64_nothing_is_cast() -> None:
    seen: list[torch.dtype] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    (edit,) = [one for one in edits("bolt:softmax=no,layers=0-0", family("llama")) if one.site == "activation"]
    assert isinstance(edit.function, Guarded)
    edit.function.function = note
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, dtype=dtype)
        assert edit.function(x) is x
    edit.function(torch.ones(3, dtype=torch.bfloat16))
    assert seen == [torch.float32, torch.float64, torch.float32]
