"""``torch.compile`` and approximations: compiled afterwards they are seen, a model compiled before is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from shutil import which
from typing import Any

import pytest
import torch
from tests.unit.approximation.families import family, token_rows

from trimtab import approximate
from trimtab.approximation.apply import active_label
from trimtab.errors import ApproximationError
from trimtab.models import LoadedModel

IDS = torch.tensor(token_rows(2, 8))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def one_layer(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def one_layer_in_place(model: Any) -> Any:
    model.model.layers[1].mlp.compile(backend="eager")
    return model


def its_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiling", [whole, in_place, one_layer, one_layer_in_place, its_forward])
@pytest.mark.parametrize("ran", [True, False])
def test_a_model_compiled_before_is_refused(compiling: Callable[[Any], Any], ran: bool) -> None:
    compiled = compiling(family("llama"))
    if ran:
        logits(compiled)  # its code, now cached, would run on without the approximation
    with (
        pytest.raises(ApproximationError, match=r"(?s)compiled already.*after approximating"),
        approximate(compiled, "a4"),
    ):
        pass
    held = LoadedModel(model=compiled, tokenizer=None, name="x")  # type: ignore[arg-type]
    with pytest.raises(ApproximationError, match="compiled already"), approximate(held, "a4"):
        pass


def test_a_compiled_wrapper_that_ran_is_refused_as_long_as_it_lives() -> None:
    model = family("llama")
    exact = logits(model)
    wrapper = whole(model)
    assert torch.equal(logits(wrapper), exact)
    with pytest.raises(ApproximationError, match="wrapper of this model is alive"), approximate(model, "a4"):
        pass
    assert active_label(model) == ""
    del wrapper
    torch.compiler.reset()
    with approximate(model, "a4"):
        assert not torch.equal(logits(model), exact)


def test_a_dropped_wrapper_that_waits_for_the_collector_is_none() -> None:
    model = family("llama")
    wrapper = whole(model)
    logits(wrapper)
    ring: list[Any] = [wrapper]
    ring.append(ring)
    torch.compiler.reset()
    gc.disable()
    try:
        del wrapper, ring
        with approximate(model, "a4"):
            assert active_label(model)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["a4", "bolt", "noise:up=0.3", "kv4", "teal:0.5", "teal:0.5,prefill=1"])
def test_compiled_inside_the_block_it_is_seen_and_leaves_no_trace(name: str) -> None:
    model = family("llama")
    exact = logits(model)
    with approximate(model, name, calibration_rows=token_rows(6, 16, seed=1)):
        eager, compiled = logits(model), whole(model)
        torch.testing.assert_close(logits(compiled), eager)
        assert not torch.equal(eager, exact)
        del compiled
    assert torch.equal(logits(model), exact)


@pytest.mark.skipif(which("g++") is None, reason="inductor compiles C++ on a CPU")
def test_inductor_s_code_of_a_block_is_approximated_too() -> None:
    """A feed-forward block alone: a whole model of one layer takes inductor half a minute and shows no more."""
    model = family("llama")
    block = model.model.layers[0].mlp
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    with torch.no_grad():
        exact = block(x)
        with approximate(model, "teal:0.5,prefill=1", calibration_rows=token_rows(6, 16, seed=1)):
            eager = block(x)
            compiled = torch.compile(block, backend="inductor")
            torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-6)
            del compiled
        assert float((eager - exact).abs().max()) > 0.05 * float(exact.abs().max())
        assert torch.equal(block(x), exact)
