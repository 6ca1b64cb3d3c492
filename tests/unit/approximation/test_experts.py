"""Stacked experts opened for editing: with nothing to edit the logits are those of before, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor

from trimtab import approximate
from trimtab.approximation.apply import install
from trimtab.approximation.sites import Site, find_sites
from trimtab.approximation.technique import Edit, Rows
from trimtab.vetting import site_errors

IDS = torch.tensor(token_rows(3, 17))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def no_op(layer: Any, site: Site) -> Callable[[Tensor], Tensor]:
    return layer.activation.forward if site == "activation" else lambda x: x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sites", [("down",), ("activation",), ("attn_in", "up", "activation", "down")])
def test_a_no_op_has_an_identity_gap_of_exactly_zero(sites: tuple[Site, ...], dtype: torch.dtype) -> None:
    model = family("mixtral").to(dtype)
    default = logits(model)
    model.set_experts_implementation("eager")  # Transformers' own loop; its default sums in another order
    before = logits(model)
    layers = find_sites(model)
    edits = [Edit(layer.index, site, no_op(layer, site)) for layer in layers for site in sites]
    undo = install(model, layers, edits, Rows())
    opened = logits(model)
    undo()
    assert torch.equal(opened, before) and torch.equal(logits(model), before)
    rounding = 8 * torch.finfo(dtype).eps * float(before.abs().max())
    assert float((opened - default).float().abs().max()) <= rounding


def test_what_leaves_the_experts_alone_does_not_open_them() -> None:
    model = family("mixtral")
    experts = find_sites(model)[0].mlp
    with approximate(model, "kv8"):
        assert "forward" not in vars(experts)
    with approximate(model, "a8"):
        assert "forward" in vars(experts)
    assert "forward" not in vars(experts)


def test_a_forward_that_was_on_the_experts_is_put_back() -> None:
    """Accelerate's hooks, for one, put a wrapper on the instance."""
    model = family("mixtral")
    experts = find_sites(model)[0].mlp
    own, calls = experts.forward, []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    experts.forward = wrapper
    before = logits(model)
    with approximate(model, "a8"):
        assert not torch.equal(logits(model), before)
    assert vars(experts)["forward"] is wrapper
    calls.clear()
    assert torch.equal(logits(model), before) and calls == [1]


def test_the_up_site_is_measured_and_the_down_site_is_not_claimed() -> None:
    model = family("mixtral")
    layers = find_sites(model)
    exact = site_errors.record(model, layers, torch.tensor(token_rows(4, 12)))
    with approximate(model, "a4") as active:
        found = site_errors.measure(model, layers, exact, active)
    sites = {shape.site for shapes in found.values() for shape in shapes}
    assert sites == {"up"}
    json.dumps([shape.document() for shape in found["local"]])
