"""Where a polynomial is an approximation: evaluated in float32, counted outside its range, named where it broke.

In bfloat16 a polynomial of degree 12 is noise (NEXUS' GELU erred by 10 within ±8), and in float16 its terms overflow.
So every function of a source is evaluated in float32 whatever the model's type, as the sources' own fixed point would
be.

Covered: counts for the functions that are none outside their range, of real tokens only; for every function, an error
where a value is not finite, told apart from one that arrived so. Not covered: what a source continues with beyond its
polynomial (that is part of the function, see ``polynomials.py``); slots of continuous batching that nobody uses (the
mask does not tell them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.approximation.sites import Site
from trimtab.approximation.technique import Rows
from trimtab.errors import ApproximationError

WIDE = (torch.float32, torch.float64)
_CALLED = {"activation": "activation function", "softmax": "softmax's exponential", "norm": "RMS norm's 1/sqrt"}


def widened(x: Tensor) -> Tensor:
    """x itself in float32 and float64, half precision as float32."""
    return x if x.dtype in WIDE else x.float()


class Span(NamedTuple):
    """Where the polynomial proper lies. ``ends``: outside it is no approximation, so what is outside is counted;
    otherwise the source continues it."""

    low: float
    high: float
    ends: bool = False

    def text(self) -> str:
        """As in a message."""
        shown = f"±{self.high:g}" if self.low == -self.high else f"{self.low:g} to {self.high:g}"
        return shown if self.ends else f"{shown}, continued outside"


@dataclass
class OutOfRange:
    """Counts of values that left a span."""

    span: Span
    outside: int = 0
    total: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, x: Tensor) -> None:
        """Count one tensor that is not empty."""
        low, high = (float(end) for end in x.detach().aminmax())
        if low < self.span.low or high > self.span.high:
            self.outside += int(((x < self.span.low) | (x > self.span.high)).sum())
        self.total += x.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def share(self) -> float:
        """Of all values so far."""
        return self.outside / max(self.total, 1)


@dataclass
class Guarded:
    """A source's function at one site of one layer.

    Attributes:
        function: the function itself. label: of the technique. fix: what to do where it left its range.
        rows: the pass under way, for its mask. counted: what left the span so far, padding apart; filled only where the
            span ends the function.
    """

    function: Callable[[Tensor], Tensor]
    label: str
    layer: int
    site: Site
    span: Span
    fix: str
    rows: Rows = field(default_factory=Rows)
    counted: OutOfRange = field(init=False)

    def __post_init__(self) -> None:
        self.counted = OutOfRange(self.span)

    def __call__(self, x: Tensor) -> Tensor:
        """The function's values in the type of x.

        Raises:
            ApproximationError: a value that is not finite.
        """
        wide = widened(x)
        if self.span.ends and (real := self._real(wide)).numel():
            self.counted.add(real)
        value = self.function(wide).to(x.dtype)
        # One sum is the cheapest look at all values: whatever is not finite makes it so. It may overflow by itself.
        if not math.isfinite(float(value.detach().sum(dtype=wide.dtype))):
            self._explain(wide.detach(), value.detach())
        return value

    def _real(self, x: Tensor) -> Tensor:
        """Without padding, of which a batch may hold any share; all of a tensor that is not of the pass under way."""
        marks = self.rows.real
        if marks is None or x.dim() < 2:
            return x
        marks = marks.reshape(-1)  # rows x width -> tokens
        if self.rows.selected is not None:
            marks = marks[self.rows.selected]
        flat = x.reshape(-1, x.shape[-1])  # tokens x channels
        if len(marks) != len(flat) or bool(marks.all()):
            return x
        return flat[marks.to(flat.device)]

    def _explain(self, x: Tensor, value: Tensor) -> None:
        broken, arrived = ~torch.isfinite(value), ~torch.isfinite(x)
        if not bool(broken.any()):
            return
        what, place = _CALLED[self.site], f"in layer {self.layer}"
        if bool(arrived.any()):
            raise ApproximationError(
                f"{self.label}: the {what} {place} was given values that are not finite",
                seen=f"{_share(arrived)} of this pass, range {self.span.text()}; {self._so_far(x)}",
                fix="something before it overflowed: another technique, an earlier layer's norm, or the model itself "
                "in float16 (load it in bfloat16 or float32)",
            )
        low, high = (float(end) for end in x.aminmax())
        raise ApproximationError(
            f"{self.label}: the {what} {place} left its range and gave no finite number",
            seen=f"values from {low:.3g} to {high:.3g}, range {self.span.text()}; {self._so_far(x)}, "
            f"{_share(broken)} of this pass not finite",
            fix=self.fix,
        )

    def _so_far(self, x: Tensor) -> str:
        if self.span.ends:
            return f"{self.counted.share:.2%} of all values so far outside"
        return f"{_share((x < self.span.low) | (x > self.span.high))} of this pass outside"


def _share(marks: Tensor) -> str:
    return f"{float(marks.float().mean()):.2%}"
