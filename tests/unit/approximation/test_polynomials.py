"""Coefficients against mpmath and the published test vectors; error bounds measured in double precision."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.approximation import polynomials as poly

POINTS = [-6.0, -4.0, -2.0, -0.5, 0.0, 0.5, 2.0, 4.0, 6.0]
VECTORS = {
    "bolt_gelu": (poly.bolt_gelu, [0, 0, -0.044745, -0.153744, 0.001621, 0.346256, 1.955255, 4, 6]),
    "bumblebee_gelu": (poly.bumblebee_gelu, [0, 0, -0.044745, -0.153744, 0.001621, 0.346256, 1.955255, 4, 6]),
    "bumblebee_silu": (
        poly.bumblebee_silu,
        [-0.020349, -0.063532, -0.246174, -0.185619, 0, 0.314381, 1.753826, 3.936468, 5.979651],
    ),
    "puma_silu": (
        poly.puma_silu,
        [-0.014570, -0.062293, -0.239170, -0.185148, 0.008506, 0.314852, 1.760830, 3.937707, 6],
    ),
    "bolt_tanh": (poly.bolt_tanh, [-1, -1, -0.962225, -0.461279, -0.002492, 0.461279, 0.962225, 1, 1]),
}
EXP_POINTS = [-10.0, -5.0, -2.0, -1.0, -0.1, 0.0]
EXP_VECTORS = {
    "bolt": (poly.bolt_exp, [0.000091, 0.006753, 0.134973, 0.368127, 0.906707, 1.000108]),
    "bumblebee t=5": (
        lambda x: poly.bumblebee_exp(x, 5),
        [0.000006, 0.004354, 0.126789, 0.362055, 0.904696, 1],
    ),
    "bumblebee t=8": (poly.bumblebee_exp, [0.000037, 0.006413, 0.134277, 0.367160, 0.904820, 1]),
    "nexus": (poly.nexus_exp, [0.000030, 0.006095, 0.133215, 0.366438, 0.904802, 1]),
}


def exact_gelu(x: float) -> float:
    return float(mpmath.mpf(x) * mpmath.ncdf(x))


def exact_silu(x: float) -> float:
    return float(mpmath.mpf(x) / (1 + mpmath.exp(-mpmath.mpf(x))))


def grid(low: float, high: float, count: int = 801) -> list[float]:
    return [float(x) for x in np.linspace(low, high, count)]


def largest_error(function: Callable[[Tensor], Tensor], exact: Callable[[float], float], places: list[float]) -> float:
    seen = function(torch.tensor(places, dtype=torch.float64)).tolist()
    return max(abs(value - exact(x)) for value, x in zip(seen, places, strict=True))


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(name: str) -> None:
    function, wanted = VECTORS[name]
    seen = function(torch.tensor(POINTS, dtype=torch.float64))
    torch.testing.assert_close(seen, torch.tensor(wanted, dtype=torch.float64), atol=1.5e-6, rtol=0)


@pytest.mark.parametrize("name", EXP_VECTORS)
def test_published_exponentials(name: str) -> None:
    function, wanted = EXP_VECTORS[name]
    seen = function(torch.tensor(EXP_POINTS, dtype=torch.float64))
    torch.testing.assert_close(seen, torch.tensor(wanted, dtype=torch.float64), atol=1.5e-6, rtol=0)


@pytest.mark.parametrize(
    ("function", "exact", "reach", "low", "high"),
    [
        (poly.bolt_gelu, exact_gelu, 5, 0.0090, 0.0094),
        (poly.bumblebee_gelu, exact_gelu, 5, 0.0045, 0.0053),
        (poly.nexus_gelu, exact_gelu, 5, 0.0005, 0.0008),
        (poly.iron_gelu, exact_gelu, 5, 0.0002, 0.0020),
        (poly.bumblebee_silu, exact_silu, 16, 0.0090, 0.0100),
        (poly.puma_silu, exact_silu, 16, 0.0600, 0.0720),
        (poly.iron_silu, exact_silu, 16, 0.0010, 0.0040),
        (poly.bolt_silu, exact_silu, 16, 0.0180, 0.0190),
        (poly.nexus_silu, exact_silu, 16, 0.0040, 0.0050),
    ],
)
def test_largest_error_against_mpmath(
    function: Callable[[Tensor], Tensor], exact: Callable[[float], float], reach: int, low: float, high: float
) -> None:
    """Both bounds: an approximation that got better by itself would be another function."""
    assert low < largest_error(function, exact, grid(-reach, reach)) < high


def test_gelu_in_the_place_of_silu_is_another_model() -> None:
    places = grid(-5, 5)
    seen = poly.bolt_gelu(torch.tensor(places, dtype=torch.float64)).tolist()
    mean = sum(abs(value - exact_silu(x)) for value, x in zip(seen, places, strict=True)) / len(places)
    assert mean == pytest.approx(0.107, abs=0.001)


def test_iron_table_exponential_is_a_product_of_digits() -> None:
    y = torch.tensor([0.0, 0.5, 1.0, 3.25, 20.0], dtype=torch.float64)
    one_table = poly.truncate(torch.exp(-y))
    seen = poly.iron_exp_negative(y)
    assert float((seen - one_table).abs().max()) <= 3 * 2**-12
    assert float(poly.iron_exp_negative(torch.tensor([5000.0]))) == 0.0


def test_nexus_explodes_beyond_its_range_unless_clamped() -> None:
    far = torch.tensor([5.5, 7.0, -7.0, 30.0])
    assert not torch.isfinite(poly.nexus_gelu(far, clamp=False)).all()
    torch.testing.assert_close(poly.nexus_gelu(far), torch.nn.functional.gelu(far), atol=2e-3, rtol=0)


def test_nexus_sign_reciprocal_and_root() -> None:
    x = torch.tensor([-1.0, -0.4, -0.1, 0.1, 0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(poly.nexus_sign(x), 0.5 * torch.sign(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        poly.nexus_reciprocal(torch.tensor([50.0, 100.0, 120.0])), torch.tensor([1 / 50, 1 / 100, 1 / 120])
    )
    roots = torch.tensor([10.0, 100.0, 900.0], dtype=torch.float64)
    torch.testing.assert_close(poly.nexus_inverse_root(roots), roots.rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("degree", "limit", "even", "bound"), [(4, 2.7, False, 2e-3), (12, 3.5, True, 1e-4)])
def test_refit_is_close_inside_its_range_and_linear_outside(
    degree: int, limit: float, even: bool, bound: float
) -> None:
    inside = grid(-limit, limit)
    assert largest_error(lambda x: poly.refit_silu(x, degree, limit, even=even), exact_silu, inside) < bound
    outside = poly.refit_silu(torch.tensor([-limit - 1, limit + 1]), degree, limit, even=even)
    assert outside.tolist() == pytest.approx([0.0, limit + 1])
