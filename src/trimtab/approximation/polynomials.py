"""Iron, BOLT, BumbleBee, NEXUS and PUMA: activation functions and exponentials as their sources state them.

Pure functions on tensors of any shape. Coefficients are those of the public code (see ``docs/design/approximation.md``
for where each was read): Iron, NeurIPS 2022; BOLT, S&P 2024; BumbleBee, NDSS 2025; NEXUS, NDSS 2025; PUMA in SPU.

Covered: GELU and SiLU where the source has one, tanh, sigmoid, exp, 1/sqrt, refits at a source's degree and range;
Iron's fixed point, which makes most of its error. Not covered: encryption and its cost; the fixed point of the others,
though it matters: as coded, BOLT's tanh errs by up to 0.038 at 11 bits (0.007 here), BumbleBee's GELU by 0.009 at 12
bits (0.005) and its SiLU by 0.012 at 18 (0.010), measured in ``test_fixed_point.py``; which function a model gets
(``activations.py``).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

BOLT_GELU = (0.001620808531841547, -0.03798164612714154, 0.5410550166368381, -0.18352506127082727, 0.020848611754127593)
BOLT_TANH = (
    -0.0024920889620412097,
    1.0542492677156243,
    -0.17616532856475706,
    -0.20093640347818847,
    0.09948747962825866,
    -0.013232131886235352,
)
BUMBLEBEE_SIGMOID = (
    0.49352908920523014,
    0.3028510171823098,
    -0.06808619212463336,
    0.006747908074344234,
    -0.0002472776978734074,
)
PUMA_MIDDLE = (0.0085064025895951, 0.5, 0.2281430841728270, 0.0, -0.011113046708173, 0.0, 0.0002743776353465)
PUMA_LEFT = (-0.3067541139982155, -0.0819767021525476, -0.0055465625580307)
NEXUS_GELU = (2.25775755e-4, 0.396880960, -0.0637042698, 8.38841647e-3, -7.17830961e-4, 3.49617829e-5, -7.26059653e-7)
IRON_BITS = 12
_LN2 = math.log(2.0)


def polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, of degree 1 at least; the constant term comes first."""
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * x + coefficient
    return value


# --- Iron: fixed point and tables -------------------------------------------------------------------------------------


def truncate(x: Tensor, bits: int = IRON_BITS) -> Tensor:
    """Fixed point with so many fractional bits, rounded down."""
    return torch.floor(x * 2.0**bits) * 2.0**-bits


@cache
def _iron_tables(bits: int) -> tuple[Tensor, Tensor]:
    """e^-(digit of weight 2^(8 k - bits)) for 8-bit digits, truncated.

    The source has a third digit, but up to 12 bits its table is 1, 0, 0, ..., and 0 is also what the second table has
    for 255: holding y at the largest number of two digits gives the same values.
    """
    digits = torch.arange(256, dtype=torch.float64)
    first, second = (truncate(torch.exp(-digits * 2.0 ** (8 * place - bits)), bits) for place in range(2))
    return first, second


def iron_exp_negative(y: Tensor, bits: int = IRON_BITS) -> Tensor:
    """e^-y for y >= 0: a product of table entries, one for each 8-bit digit of y (12 bits or fewer)."""
    fixed = torch.floor(y.double() * 2.0**bits).clamp(0, 2.0**16 - 1).long()
    value = torch.ones_like(y, dtype=torch.float64)
    for place, table in enumerate(_iron_tables(bits)):
        value = truncate(value * table.to(y.device)[(fixed >> (8 * place)) & 255], bits)
    return torch.where(y.isnan(), y, value.to(y.dtype))  # a table would make a number of a NaN


def iron_sigmoid(x: Tensor, bits: int = IRON_BITS) -> Tensor:
    """1 / (1 + e^-|x|), mirrored for negative x."""
    right = truncate(1.0 / (1.0 + iron_exp_negative(x.abs(), bits)), bits)
    return torch.where(x >= 0, right, 1.0 - right)


def iron_tanh(x: Tensor, bits: int = IRON_BITS) -> Tensor:
    """(1 - e^-2|x|) / (1 + e^-2|x|), the sign restored."""
    small = iron_exp_negative(2.0 * x.abs(), bits)
    return torch.sign(x) * truncate((1.0 - small) / (1.0 + small), bits)


def iron_silu(x: Tensor, bits: int = IRON_BITS) -> Tensor:
    """x sigmoid(x)."""
    return truncate(truncate(x, bits) * iron_sigmoid(x, bits), bits)


def iron_gelu(x: Tensor, bits: int = IRON_BITS) -> Tensor:
    """The tanh form of GELU; beyond 8 tanh is 1 to far more than 12 bits, so the cube is taken of at most 8."""
    inner = truncate(x, bits).clamp(-8.0, 8.0)
    square = truncate(inner * inner, bits)
    cube = truncate(square * inner, bits)
    argument = truncate(math.sqrt(2.0 / math.pi) * (inner + truncate(0.044715 * cube, bits)), bits)
    return truncate(truncate(0.5 * x, bits) * (1.0 + iron_tanh(argument, bits)), bits)


# --- BOLT -------------------------------------------------------------------------------------------------------------


def bolt_gelu(x: Tensor) -> Tensor:
    """Degree 4 in |x| up to 2.7, then (x + |x|) / 2."""
    y = x.abs()
    middle = torch.add(polynomial(BOLT_GELU, y.clamp_max(2.7)), x, alpha=0.5)
    return torch.where(y > 2.7, x.clamp_min(0.0), middle)  # (x + |x|) / 2


def bolt_tanh(x: Tensor) -> Tensor:
    """Degree 5 in |x| up to 2.855, then the sign; the sign of 0 is taken as 1, as in the source's code."""
    y = x.abs()
    sign = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return torch.where(y > 2.855, sign, sign * polynomial(BOLT_TANH, y.clamp_max(2.855)))


def bolt_exp(x: Tensor) -> Tensor:
    """e^x for x <= 0: a square of the remainder modulo ln 2, shifted right at most 13 times (so never 0)."""
    shifts = torch.floor(x / -_LN2)
    rest = x + shifts * _LN2
    value = (1468 / 4096) * (rest + 5542 / 4096).square() + 1409 / 4096
    return value * torch.exp2(shifts.clamp(0, 13).neg())


# --- BumbleBee, PUMA --------------------------------------------------------------------------------------------------


def bumblebee_gelu(x: Tensor) -> Tensor:
    """BOLT's polynomial up to 3, 0 below -3, x above."""
    y = x.abs()
    middle = torch.add(polynomial(BOLT_GELU, y.clamp_max(3.0)), x, alpha=0.5)
    return torch.where(x < -3, 0.0, torch.where(x >= 3, x, middle))


def bumblebee_silu(x: Tensor) -> Tensor:
    """x times a degree-4 sigmoid in |x| up to 8; x above, 0 below -8."""
    right = polynomial(BUMBLEBEE_SIGMOID, x.abs().clamp_max(8.0))
    middle = x * torch.where(x >= 0, right, 1.0 - right)
    return torch.where(x >= 8, x, torch.where(x < -8, 0.0, middle))


def bumblebee_exp(x: Tensor, squarings: int = 8) -> Tensor:
    """e^x for x <= 0: (1 + x / 2^t)^(2^t) for x >= -14, else 0."""
    value = 1.0 + x.clamp_min(-14.0) * 2.0**-squarings
    for _ in range(squarings):
        value = value * value
    return torch.where(x < -14, 0.0, value)


def puma_silu(x: Tensor) -> Tensor:
    """Two polynomials, on [-8, -4) and [-4, 4]; 0 below, x above."""
    left = polynomial(PUMA_LEFT, x.clamp(-8.0, -4.0))
    middle = polynomial(PUMA_MIDDLE, x.clamp(-4.0, 4.0))
    inner = torch.where(x < -4, left, middle)  # in this order a NaN stays one
    return torch.where(x > 4, x, torch.where(x < -8, 0.0, inner))


# --- NEXUS ------------------------------------------------------------------------------------------------------------

NEXUS_RANGE = 5.0  # |x| up to which the sign composition's argument stays within [-1, 1]


def nexus_sign(x: Tensor) -> Tensor:
    """Half the sign of x in [-1, 1] by composed polynomials; outside, the composition explodes."""
    f = (315 / 128, -420 / 128, 378 / 128, -180 / 128, 35 / 128)  # of x, x^3, x^5, x^7, x^9
    g = (5850 / 1024, -34974 / 1024, 97015 / 1024, -113492 / 1024, 46623 / 1024)
    for coefficients in (g, g, f, f):
        x = x * polynomial(coefficients, x * x)
    return 0.5 * x


def nexus_gelu(x: Tensor, *, clamp: bool = True) -> Tensor:
    """Degree 12 between -3.5 and 3.5, the segments joined by the sign composition.

    Args:
        x: any values; the source is valid for |x| <= 5 (``NEXUS_RANGE``).
        clamp: hold the sign's argument within [-1, 1] and the polynomial's within its segment; without, values outside
            the range overflow, as they would in the source.
    """
    low, high = (x + 3.5) / 8.5, (x - 3.5) / 8.5
    inner = x.clamp(-3.5 - 1.5, 3.5 + 1.5) if clamp else x
    if clamp:
        low, high = low.clamp(-1.0, 1.0), high.clamp(-1.0, 1.0)
    before, after = nexus_sign(low), nexus_sign(high)
    middle = 0.5 * inner + polynomial(NEXUS_GELU, inner * inner)
    return (before - after) * middle + (after + 0.5) * x


def nexus_exp(x: Tensor) -> Tensor:
    """(1 + x / 128)^128, for x in [-128, 0]."""
    value = 1.0 + x / 128.0
    for _ in range(7):
        value = value * value
    return value


def nexus_reciprocal(x: Tensor, scale: float = 100.0) -> Tensor:
    """1 / x by x/scale -> prod (1 + (1 - x/scale)^(2^i)), i = 0..4: good where x/scale lies near 1."""
    y = 1.0 - x / scale
    value = torch.ones_like(x)
    for _ in range(5):
        value = value * (1.0 + y)
        y = y * y
    return value / scale


NEXUS_ROOT_RANGE = (2.0, 950.0)  # within 1 % of 1/sqrt; above 1,000 the guess is negative, and so is the result


def nexus_inverse_root(x: Tensor) -> Tensor:
    """1 / sqrt(x) by a linear guess (made for x up to about 1,000), four Newton and two Goldschmidt steps."""
    guess = -1.29054537e-4 * x + 0.129054537
    for _ in range(4):
        guess = guess * (1.5 - 0.5 * x * guess * guess)
    root, half = x * guess, 0.5 * guess
    for _ in range(2):
        rest = 0.5 - root * half
        root, half = root + root * rest, half + half * rest
    return 2.0 * half


# --- ports of GELU-only sources to SiLU -------------------------------------------------------------------------------


def bolt_silu(x: Tensor) -> Tensor:
    """x (1 + tanh(x / 2)) / 2 with BOLT's tanh."""
    return 0.5 * x * (1.0 + bolt_tanh(0.5 * x))


def nexus_silu(x: Tensor) -> Tensor:
    """x sigmoid(x) with NEXUS's exponential and reciprocal.

    1 + e^-|x| lies in [1, 2], so the reciprocal is scaled by 2 where the source, for sums over a softmax, has 100.
    """
    right = nexus_reciprocal(1.0 + nexus_exp(-x.abs().clamp_max(128.0)), scale=2.0)
    return x * torch.where(x >= 0, right, 1.0 - right)


@cache
def refit_coefficients(degree: int, limit: float, even: bool) -> tuple[float, ...]:
    """Coefficients in y of silu(x) - x/2 on |x| <= limit: y = |x| to ``degree``, or y = x^2 to degree/2 where ``even``.

    A Chebyshev interpolation, near the best uniform fit; silu(x) - x/2 = (x/2) tanh(x/2) is even.
    """
    order = degree // 2 if even else degree
    top = limit * limit if even else limit

    def target(y: np.ndarray) -> np.ndarray:
        x = np.sqrt(y) if even else y
        return 0.5 * x * np.tanh(0.5 * x)

    fitted = np.polynomial.Chebyshev.interpolate(target, order, domain=[0.0, top])
    return tuple(fitted.convert(kind=np.polynomial.Polynomial).coef.tolist())


def refit_silu(x: Tensor, degree: int, limit: float, *, even: bool) -> Tensor:
    """SiLU by the refitted polynomial inside the limit, (x + |x|) / 2 outside."""
    y = x.abs()
    inner = y.clamp_max(limit)
    middle = 0.5 * x + polynomial(refit_coefficients(degree, limit, even), inner * inner if even else inner)
    return torch.where(y > limit, 0.5 * (x + y), middle)
