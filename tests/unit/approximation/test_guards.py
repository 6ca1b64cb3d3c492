"""Values outside a polynomial's range are counted, values that are not finite are named: layer, site, range, shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor

from trimtab import approximate
from trimtab.approximation import polynomials as poly
from trimtab.approximation.activations import SOURCES
from trimtab.approximation.apply import installed
from trimtab.approximation.naming import parse
from trimtab.approximation.ranges import Guarded, OutOfRange, Span
from trimtab.approximation.sites import Site, find_sites
from trimtab.approximation.technique import Edit, Rows, Subject
from trimtab.errors import ApproximationError

IDS = torch.tensor(token_rows(2, 10))
EVERY = [*((name, kind) for name in SOURCES for kind in ("llama", "gemma2")), ("bolt:port=refit", "llama")]


def guards(name: str, model: Any, site: str) -> list[Guarded]:
    (technique,) = parse(name)
    subject = Subject(model, find_sites(model), Rows(), lambda: None)  # type: ignore[arg-type, return-value]
    found = [edit.function for edit in technique.edits(subject) if edit.site == site]
    assert all(isinstance(one, Guarded) for one in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "kind"), EVERY)
@pytest.mark.parametrize("site", ["activation", "softmax"])
def test_every_function_names_what_arrived_broken(name: str, kind: str, site: str) -> None:
    guard = guards(name, family(kind), site)[1]
    for bad in (torch.nan, torch.inf):
        if site == "softmax" and bad == torch.inf:
            continue  # e^-inf is a number
        x = torch.tensor([1.0, 2.0, bad, 3.0]) * (-1.0 if site == "softmax" else 1.0)
        with pytest.raises(ApproximationError) as caught:
            guard(x)
        text = str(caught.value)
        assert "layer 1" in text and "given values that are not finite" in text and "25.00%" in text
        assert guard.span.text() in text and guard.label in text
        assert ("exponential" in text) == (site == "softmax")


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_every_function_names_a_number_that_it_broke_itself(name: str, kind: str) -> None:
    guard = guards(name, family(kind), "activation")[0]
    whole = guard.function
    guard.function = lambda x: torch.where(x > 9, torch.inf, whole(x))
    with pytest.raises(ApproximationError) as caught:
        guard(torch.tensor([-1.0, 0.0, 1.0, 10.0]))
    text = str(caught.value)
    assert "in layer 0 left its range and gave no finite number" in text and "values from -1 to 10" in text
    assert "25.00% of this pass not finite" in text and "outside" in text


def test_iron_overflows_far_out_and_says_so() -> None:
    """Fixed point multiplies by 2^12; in float32 that holds to 8e34."""
    for kind in ("llama", "gemma2"):
        guard = guards("iron", family(kind), "activation")[0]
        assert torch.isfinite(guard(torch.tensor([6e4, -6e4], dtype=torch.float16))).all()
        with pytest.raises(ApproximationError, match=r"(?s)iron: .*layer 0 left its range.*to 1e\+36.*50.00%"):
            guard(torch.tensor([1.0, 1e36]))


def test_sums_that_overflow_are_no_alarm() -> None:
    guard = Guarded(lambda x: x, "x", 0, "activation", Span(-1.0, 1.0), "")
    large = torch.full((8,), 3e38)
    assert torch.equal(guard(large), large)
    half = torch.full((8,), 6e4, dtype=torch.float16)
    assert torch.equal(guard(half), half)


def test_counts_of_activation_and_norm_are_kept_apart() -> None:
    model = family("gemma2")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(400)
    with approximate(model, "nexus:norm=yes,layers=1-1") as active:
        model(input_ids=IDS)
    activation, norm = active.out_of_range(), active.out_of_range("norm")
    assert set(activation) == set(norm) == {1}
    assert 0.05 < activation[1][0] < 1.0 and activation[1][1] < -5 < 5 < activation[1][2]
    assert norm[1][1] > 0.0 and norm[1] != activation[1]
    assert active.out_of_range("softmax") == {}


@pytest.mark.parametrize("name", ["gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize("site", ["activation", "norm"])
def test_padding_is_not_counted(name: str, site: Site) -> None:
    """A batch may hold any share of it, and its activations lie anywhere."""
    model, texts = family(name), [row[:length] for row, length in zip(token_rows(3, 10), (10, 6, 3), strict=True)]
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 5.0  # padding is far from any token
    layer = find_sites(model)[0]
    exact = layer.activation.forward if site == "activation" else torch.rsqrt

    def counted(span: Span, *passes: tuple[Tensor, Tensor | None]) -> OutOfRange:
        rows = Rows()
        guard = Guarded(exact, "x", 0, site, span, "", rows)
        with installed(model, [layer], [Edit(0, site, guard)], rows), torch.no_grad():
            for ids, mask in passes:
                model(input_ids=ids, attention_mask=mask)
        return guard.counted

    alone = [(torch.tensor([text]), None) for text in texts]
    whole = counted(Span(0.0, 0.0, ends=True), *alone)
    span = Span(whole.low, (whole.low + whole.high) / 2, ends=True)
    ids = torch.tensor([[0] * 14 + texts[0], texts[1] + [0] * 18, [0] * 7 + texts[2] + [0] * 14])
    wanted, found = counted(span, *alone), counted(span, (ids, (ids != 0).long()))
    assert 0 < wanted.outside < wanted.total
    assert (found.outside, found.total) == (wanted.outside, wanted.total)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-4, abs=1e-6)


def test_a_norm_outside_its_range_is_named_as_the_norm() -> None:
    model = family("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5000.0)
    with approximate(model, "nexus:norm=yes"), pytest.raises(ApproximationError) as caught:
        model(input_ids=IDS)
    text = str(caught.value)
    assert "RMS norm's 1/sqrt in layer 0" in text and "2 to 950" in text and "norm=yes" in text
    assert "activation" not in text


@pytest.mark.parametrize(("name", "scale"), [("llama", 40.0), ("gemma2", 7.0)])
def test_norms_by_the_source_s_root_are_those_written_out(name: str, scale: float) -> None:
    """Each norm against the formula in double precision, weights by each family's convention; then whole logits."""
    model = family(name)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        model.get_input_embeddings().weight[0] = 1.0  # the padding token: a sum of squares of 0 has no root
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.2, 0.2, len(parameter)))
            else:
                parameter.mul_(9.0)  # so that each norm's sum of squares lies in the root's range
    norms = find_sites(model)[0].norms
    before = model(input_ids=IDS).logits.detach()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.3, 1, 2, 3, 4, 5])[:, None]
    with approximate(model, "nexus:norm=yes,softmax=no") as active, torch.no_grad():
        changed = model(input_ids=IDS).logits
        whole = active.out_of_range("norm")
        for norm in norms:
            weight = (norm.weight + (name == "gemma2")).double()
            epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            squares = x.double().square().sum(-1, keepdim=True) + 32 * epsilon
            wanted = x.double() * 32**0.5 * poly.nexus_inverse_root(squares) * weight
            torch.testing.assert_close(norm(x).double(), wanted, rtol=1e-4, atol=1e-5)
            exact = x.double() * (squares / 32).rsqrt() * weight
            inside = ((squares > 2) & (squares < 950)).squeeze(-1)
            assert 3 <= int(inside.sum()) <= 6
            torch.testing.assert_close(wanted[inside], exact[inside], rtol=0.012, atol=1e-6)
    assert {layer: share for layer, (share, _, _) in whole.items()} == {0: 0.0, 1: 0.0}, whole
    assert 0.0 < float((changed - before).abs().max()) < 0.05 * float(before.abs().max())
    assert torch.equal(model(input_ids=IDS).logits, before)
