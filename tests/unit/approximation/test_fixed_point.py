"""What the sources' own fixed point adds to their errors; only Iron's is part of our functions.

Written out from the code of BOLT (EzPC, branch bert) and BumbleBee (activation.cc): coefficients cut to so many
fractional bits, each product rounded down. Bits as there: 11 for BOLT's GELU and tanh, 12 for BumbleBee's GELU, 18
(SPU's default for 64 bits) for its SiLU and exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.approximation import polynomials as poly


def cut(number: float, bits: int) -> float:
    return math.trunc(number * 2**bits) / 2**bits


def floor(x: Tensor, bits: int) -> Tensor:
    return torch.floor(x * 2.0**bits) * 2.0**-bits


def bolt_gelu(x: Tensor, bits: int) -> Tensor:
    slope, linear, constant, shift, rest = (
        cut(one, bits)
        for one in (
            *(0.14439048359960427, -0.7077117131613893, 4.5702822654246535),
            *(-8.15444702051307, 16.382265425072532),
        )
    )
    x = floor(x, bits)
    y = x.abs().clamp_max(2.7)
    left = floor(slope * y, bits)
    z = floor((left + linear) * y, bits) + constant
    middle = floor((z + left + shift) * z, bits) + rest + floor(0.5 * x, bits)
    return torch.where(x.abs() < 2.7, middle, x.clamp_min(0.0))


def bolt_tanh(x: Tensor, bits: int) -> Tensor:
    t0, t1, t2, t3, t4, t5 = (
        cut(one, bits)
        for one in (
            *(-4.259314087994767, 18.86353816972803, -36.42402897526823),
            *(-0.013232131886235352, -3.3289339650097993, -0.0024920889620412097),
        )
    )
    x = floor(x, bits)
    y = x.abs().clamp_max(2.855)
    first = floor((y + t0) * y, bits) + t1
    second = floor((first + y + t2) * first, bits)
    second = floor(floor(second * t3, bits) * y, bits) + floor(y * t4, bits) + t5
    sign = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    return torch.where(x.abs() > 2.855, sign, second * sign)


def bolt_silu(x: Tensor, bits: int) -> Tensor:
    """Our port with that tanh."""
    half = floor(0.5 * floor(x, bits), bits)
    return floor(half * (1.0 + bolt_tanh(half, bits)), bits)


def powers(y: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    square = floor(y * y, bits)
    return square, floor(y * square, bits), floor(square * square, bits)


def bumblebee_gelu(x: Tensor, bits: int) -> Tensor:
    x = floor(x, bits)
    y = x.abs().clamp_max(3.0)
    a = [cut(one, bits) for one in poly.BOLT_GELU]
    y2, y3, y4 = powers(y, bits)
    middle = floor(a[0] + a[1] * y + a[2] * y2 + a[3] * y3 + a[4] * y4 + 0.5 * x, bits)
    return torch.where(x < -3, 0.0, torch.where(x >= 3, x, middle))


def bumblebee_silu(x: Tensor, bits: int) -> Tensor:
    x = floor(x, bits)
    y = x.abs().clamp_max(8.0)
    a = [cut(one, bits) for one in poly.BUMBLEBEE_SIGMOID[:4]] + [cut(poly.BUMBLEBEE_SIGMOID[4], max(bits, 21))]
    y2, y3, y4 = powers(y, bits)
    right = floor(a[0] + a[1] * y + a[2] * y2 + a[3] * y3 + a[4] * y4, bits)
    sigmoid = torch.where(x >= 8, 1.0, torch.where(x < -8, 0.0, torch.where(x >= 0, right, 1.0 - right)))
    return floor(x * sigmoid, bits)


def bumblebee_exp(x: Tensor, bits: int) -> Tensor:
    value = 1.0 + floor(x.clamp_min(-14.0) * 2.0**-8, bits)
    for _ in range(8):
        value = floor(value * value, bits)
    return torch.where(x < -14, 0.0, value)


def tanh_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def largest(function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    return float((function(x) - exact(x)).abs().max())


GELU, SILU, TANH, EXP = torch.nn.functional.gelu, torch.nn.functional.silu, torch.tanh, torch.exp
Case = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor], int, Callable[[Tensor], Tensor], float, float]
CASES: dict[str, tuple[Case, float, float]] = {  # largest error as numbers, and in fixed point
    "BOLT GELU": ((poly.bolt_gelu, bolt_gelu, 11, GELU, -5, 5), 0.0094, 0.0094),
    "BOLT tanh": ((poly.bolt_tanh, bolt_tanh, 11, TANH, -5, 5), 0.0066, 0.0378),
    "BOLT SiLU": ((poly.bolt_silu, bolt_silu, 11, SILU, -16, 16), 0.0189, 0.1086),
    "BumbleBee GELU": ((poly.bumblebee_gelu, bumblebee_gelu, 12, GELU, -5, 5), 0.0052, 0.0087),
    "BumbleBee SiLU": ((poly.bumblebee_silu, bumblebee_silu, 18, SILU, -16, 16), 0.0099, 0.0118),
    "BumbleBee exp": ((poly.bumblebee_exp, bumblebee_exp, 18, EXP, -14, 0), 0.0011, 0.0014),
}


@pytest.mark.parametrize("name", CASES)
def test_largest_error_as_numbers_and_in_the_source_s_fixed_point(name: str) -> None:
    (function, fixed, bits, exact, low, high), free, rounded = CASES[name]
    assert largest(function, exact, low, high) == pytest.approx(free, abs=1e-4)
    assert largest(lambda x: fixed(x, bits), exact, low, high) == pytest.approx(rounded, abs=1e-4)
    # With many bits the arithmetic written out here is the function itself, but beside where a piece ends.
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    gap = (fixed(x, 44) - function(x)).abs()
    assert float(gap.median()) < 1e-6 and float((gap > 1e-4).double().mean()) < 1e-3


def test_most_of_iron_s_error_is_its_fixed_point() -> None:
    """Its functions with exact tables and products: the tanh form of GELU, and no error at all."""
    assert largest(tanh_gelu, GELU, -5, 5) == pytest.approx(0.0005, abs=1e-4)
    assert largest(poly.iron_gelu, GELU, -5, 5) == pytest.approx(0.0019, abs=1e-4)
    assert largest(poly.iron_silu, SILU, -16, 16) == pytest.approx(0.0037, abs=1e-4)
    assert largest(lambda x: poly.iron_exp_negative(-x), EXP, -14, 0) == pytest.approx(0.0006, abs=1e-4)
