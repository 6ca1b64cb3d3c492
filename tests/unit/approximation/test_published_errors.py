"""Largest and mean errors against mpmath, in double precision, as the specification states them: not more, not less."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.approximation import polynomials as poly

POINTS = 4001
EXACT: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "exp": mpmath.exp,
}
KINKS = (2.7, 2.855, 3.0, 3.5, 4.0, 5.71, 8.0, 14.0)  # where a piece ends: the largest error often lies beside one


class Case(NamedTuple):
    """``largest``, ``mean``: stated, to the last digit given; None where nothing is."""

    name: str
    function: Callable[[Tensor], Tensor]
    exact: str
    low: float
    high: float
    largest: str
    mean: str | None


def iron_exp(x: Tensor) -> Tensor:
    return poly.iron_exp_negative(-x)


STATED = [  # sections 2.2 to 2.5 of the specification
    Case("BOLT", poly.bolt_gelu, "gelu", -5, 5, "0.00936", "0.00118"),
    Case("BOLT", poly.bolt_tanh, "tanh", -5, 5, "0.0066", "0.0016"),
    Case("BOLT", poly.bolt_exp, "exp", -13.9, 0, "0.0020", None),
    Case("BOLT", poly.bolt_silu, "silu", -5, 5, "0.0055", "0.0020"),
    Case("BOLT", poly.bolt_silu, "silu", -16, 16, "0.0189", "0.0022"),
    Case("BumbleBee", poly.bumblebee_gelu, "gelu", -5, 5, "0.0052", "0.0010"),
    Case("BumbleBee", poly.bumblebee_silu, "silu", -16, 16, "0.0099", "0.0028"),
    *(
        Case(f"BumbleBee, t={t}", partial(poly.bumblebee_exp, squarings=t), "exp", -14, 0, largest, None)
        for t, largest in ((5, "0.0085"), (6, "0.0043"), (7, "0.0021"), (8, "0.0011"))
    ),
    Case("PUMA", poly.puma_silu, "silu", -16, 16, "0.0719", "0.0044"),
    Case("NEXUS", poly.nexus_gelu, "gelu", -5, 5, "0.00069", "0.0002"),
    Case("NEXUS", poly.nexus_exp, "exp", -14, 0, "0.0021", None),
]
OURS = [  # nothing is stated of tables throughout, or of our ports: what was measured here
    Case("Iron", poly.iron_gelu, "gelu", -5, 5, "0.0019", "0.0004"),
    Case("Iron", poly.iron_tanh, "tanh", -5, 5, "0.0010", "0.0004"),
    Case("Iron", poly.iron_silu, "silu", -16, 16, "0.0037", "0.0006"),
    Case("Iron", iron_exp, "exp", -14, 0, "0.0006", "0.0002"),
    Case("BOLT", poly.bolt_exp, "exp", -13.9, 0, "0.0020", "0.0001"),
    Case("NEXUS", poly.nexus_silu, "silu", -16, 16, "0.0048", "0.0013"),
    Case("NEXUS", poly.nexus_exp, "exp", -14, 0, "0.0021", "0.0005"),
]


@cache
def grid(exact: str, low: float, high: float) -> tuple[Tensor, Tensor, int]:
    """Places and exact values: an even grid, then both sides of each kink; how many are of the grid."""
    even = np.linspace(low, high, POINTS)
    ends = [sign * kink for kink in KINKS for sign in (-1.0, 1.0) if low < sign * kink < high]
    near = [np.nextafter(end, end + side) for end in ends for side in (-1.0, 1.0)]
    places = [float(x) for x in (*even, *ends, *near)]
    values = [float(EXACT[exact](mpmath.mpf(x))) for x in places]
    return torch.tensor(places, dtype=torch.float64), torch.tensor(values, dtype=torch.float64), POINTS


def errors(case: Case) -> tuple[float, float]:
    """Largest error, and mean over the even grid."""
    places, values, even = grid(case.exact, case.low, case.high)
    error = (case.function(places) - values).abs()
    return float(error.max()), float(error[:even].mean())


def as_stated(seen: float, text: str) -> bool:
    """Whether a number is the one stated, up to one of its last digit."""
    digit = 10.0 ** -len(text.partition(".")[2])
    return abs(seen - float(text)) <= 1.01 * digit


@pytest.mark.parametrize("case", [*STATED, *OURS], ids=lambda case: f"{case.name} {case.exact} {case.low:g}")
def test_errors_are_those_stated(case: Case) -> None:
    largest, mean = errors(case)
    assert as_stated(largest, case.largest), largest
    assert case.mean is None or as_stated(mean, case.mean), mean


def test_iron_s_truncation_alone_has_the_stated_error() -> None:
    """With an exact tanh; its tables add the rest (0.0012 becomes 0.0019)."""
    x, values, even = grid("gelu", -5.0, 5.0)
    inner = poly.truncate(x)
    cube = poly.truncate(poly.truncate(inner * inner) * inner)
    argument = poly.truncate((2 / torch.pi) ** 0.5 * (inner + poly.truncate(0.044715 * cube)))
    seen = poly.truncate(poly.truncate(0.5 * x) * (1.0 + poly.truncate(torch.tanh(argument))))
    error = (seen - values).abs()
    assert as_stated(float(error.max()), "0.0012")
    assert float(error[:even].mean()) == pytest.approx(0.00035, abs=2e-5)  # which halves are truncated is not stated


def test_nexus_reciprocal_errs_by_the_power_that_its_product_leaves_out() -> None:
    """prod (1 + y^(2^i)), i = 0..4, is the series of 1/(1 - y) up to y^31: relative error y^32, y = 1 - x/scale."""
    for scale in (2.0, 100.0):
        x = scale * torch.linspace(0.02, 1.9, 200, dtype=torch.float64)
        seen = poly.nexus_reciprocal(x, scale=scale).tolist()
        for value, place in zip(seen, x.tolist(), strict=True):
            exact = 1 / mpmath.mpf(place)
            left_out = (1 - mpmath.mpf(place) / scale) ** 32
            assert float(abs(value - exact * (1 - left_out)) / exact) < 1e-13
    good = poly.nexus_reciprocal(torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64), scale=2.0)
    assert float((good * torch.tensor([1.0, 1.5, 2.0]) - 1.0).abs().max()) < 3e-10  # what our port to SiLU needs
    far = float(poly.nexus_reciprocal(torch.tensor([1.0], dtype=torch.float64)))
    assert 0.70 < 1.0 - far < 0.75  # a softmax whose sum is near 1, divided by it, is wrong by 72 %


def test_nexus_root_is_within_one_percent_in_its_range_and_not_outside() -> None:
    low, high = poly.NEXUS_ROOT_RANGE
    assert (low, high) == (2.0, 950.0)

    def relative(places: list[float]) -> list[float]:
        seen = poly.nexus_inverse_root(torch.tensor(places, dtype=torch.float64)).tolist()
        return [float(value * mpmath.sqrt(x) - 1) for value, x in zip(seen, places, strict=True)]

    inside = [abs(error) for error in relative([float(x) for x in np.geomspace(low, high, 2001)])]
    assert 0.0095 < max(inside) < 0.0101  # both ends: 1.0 %
    assert max(abs(error) for error in relative([float(x) for x in np.linspace(20, 700, 500)])) < 1e-4
    assert abs(relative([1.5])[0]) > 0.01 and abs(relative([980.0])[0]) > 0.01
    assert relative([1050.0])[0] == pytest.approx(-2.0, abs=0.1)  # minus the root
