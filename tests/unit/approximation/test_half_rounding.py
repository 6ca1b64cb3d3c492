"""Rounding in half precision is that of float32, cast back once; in float32 it is the formula, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor

from trimtab import approximate
from trimtab.approximation.quantization import round_asymmetric, round_symmetric, smooth

HALVES = (torch.bfloat16, torch.float16)
BITS = (16, 12, 10, 8, 4, 2)
KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "even": round_symmetric,
    "full": lambda x, bits: round_symmetric(x, bits, "full"),
    "asymmetric": round_asymmetric,
}


def tokens(dtype: torch.dtype) -> Tensor:
    """Tokens of several sizes, some far from symmetric about zero."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 256, generator=draw) * torch.logspace(-2, 2, 40)[:, None]
    x[::3] += 3.0 * x[::3].std(-1, keepdim=True)
    return x.to(dtype)


def steps(x: np.ndarray, bits: int, kind: str) -> np.ndarray:
    """Distance of two levels, for each token."""
    if kind == "asymmetric":
        return (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / (2**bits - 1)
    return np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - (1 if kind == "even" else 0.5))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_moves_by_half_a_step_and_the_last_digit_of_its_type(kind: str, bits: int, dtype: torch.dtype) -> None:
    x = tokens(dtype)
    seen = KINDS[kind](x, bits)
    assert seen.dtype == dtype
    assert torch.equal(seen, KINDS[kind](x.float(), bits).to(dtype))
    exact, rounded = x.double().numpy(), seen.double().numpy()
    allowed = 0.501 * steps(exact, bits, kind) + 0.5 * torch.finfo(dtype).eps * np.abs(rounded)
    assert (np.abs(rounded - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_zeros_stays_one(kind: str, bits: int, dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 32, dtype=dtype)
    assert torch.equal(KINDS[kind](zeros, bits), zeros)
    assert torch.equal(smooth(zeros, torch.full((32,), 3e-5), lambda x: KINDS[kind](x, bits)), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_in_float32_the_formulas_are_as_they_were_to_the_bit(bits: int) -> None:
    x = tokens(torch.float32)
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / (2 ** (bits - 1) - 1)
    assert torch.equal(round_symmetric(x, bits), torch.round(x / step) * step)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low).clamp_min(1e-5) / (2**bits - 1)
    zero = torch.round(-low / step)
    assert torch.equal(round_asymmetric(x, bits), ((torch.round(x / step) + zero).clamp(0, 2**bits - 1) - zero) * step)
    scale = torch.linspace(0.1, 3.0, 256)
    assert torch.equal(smooth(x, scale, lambda y: round_symmetric(y, bits)), round_symmetric(x / scale, bits) * scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_smoothing_in_half_precision_is_that_of_float32_cast_once(dtype: torch.dtype) -> None:
    x, scale = tokens(dtype), torch.logspace(-1, 1, 256)
    seen = smooth(x, scale, lambda y: round_symmetric(y, 8))
    assert torch.equal(seen, (round_symmetric(x.float() / scale, 8) * scale).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["smoothquant:10", "smoothquant:12", "smoothquant:16", "omniquant:16,steps=1"])
def test_many_bits_on_a_model_in_half_precision_change_little(name: str, dtype: torch.dtype) -> None:
    model = family("llama").to(dtype)
    ids = torch.tensor([[0, *row] for row in token_rows(2, 9)])  # the padding token is embedded as zeros
    assert not model.get_input_embeddings().weight[0].any()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with approximate(model, name, calibration_rows=token_rows(6, 16, seed=1)):
            seen = model(input_ids=ids).logits
    assert seen.dtype == dtype and torch.isfinite(seen).all()
    assert float((seen - before).float().abs().max()) < 0.05 * float(before.float().abs().max())
