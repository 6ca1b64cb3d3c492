"""Which polynomial a model's activation function gets, under which port, and within which range.

Every source but BumbleBee states a GELU only. For a SiLU model there are two honest ports: through the sigmoid with the
source's own tanh or exponential ("sigmoid"), or a polynomial refitted to SiLU at the source's degree and range
("refit"). Putting the GELU polynomial in for SiLU unchanged is another model (mean error 0.107 on [-5, 5]) and is
refused.

Covered: activation, the softmax's exponential, NEXUS's 1/sqrt in RMS norms where asked for. Not covered: what the
sources do elsewhere in their protocols (comparisons, argmax, embedding look-up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.approximation import polynomials as poly
from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Parameter, written
from trimtab.approximation.sites import activation_kind
from trimtab.approximation.technique import Edit, OutOfRange, Subject
from trimtab.errors import ApproximationError, UsageError

Function = Callable[[Tensor], Tensor]
PORTS = ("sigmoid", "refit")


class Source(NamedTuple):
    """What one paper gives: its GELU, its SiLU or None, our port through the sigmoid, its exp, degree and range."""

    title: str
    gelu: Function
    silu: Function | None
    by_sigmoid: Function
    exp: Function
    degree: int
    limit: float
    even: bool


def _iron_exp(x: Tensor) -> Tensor:
    return poly.iron_exp_negative(-x)


SOURCES = {
    "iron": Source("Iron", poly.iron_gelu, None, poly.iron_silu, _iron_exp, 0, 0.0, False),
    "bolt": Source("BOLT", poly.bolt_gelu, None, poly.bolt_silu, poly.bolt_exp, 4, 2.7, False),
    "bumblebee": Source(
        "BumbleBee", poly.bumblebee_gelu, poly.bumblebee_silu, poly.bumblebee_silu, poly.bumblebee_exp, 4, 3.0, False
    ),
    "nexus": Source("NEXUS", poly.nexus_gelu, None, poly.nexus_silu, poly.nexus_exp, 12, 3.5, True),
    "puma": Source("PUMA", poly.bumblebee_gelu, poly.puma_silu, poly.puma_silu, poly.bumblebee_exp, 6, 4.0, False),
}


@dataclass(frozen=True)
class Polynomial:
    """One source on one model.

    Attributes:
        source: key of ``SOURCES``. port: for SiLU where the source has none; "" for the default.
        limit: range of a refit; None for the source's own. softmax: replace the exponential too. norm: NEXUS only,
            1/sqrt in RMS norms. clamp: hold NEXUS' GELU within its range; off, it overflows as the source would.
        layers: which layers.
    """

    source: str
    port: str = ""
    limit: float | None = None
    softmax: str = "yes"
    norm: str = "no"
    clamp: str = "yes"
    layers: LayerRange = ALL_LAYERS

    whole_rows = False

    def __post_init__(self) -> None:
        if self.port == "refit" and self.source == "iron":
            raise UsageError("Iron is tables, not a polynomial: there is nothing to refit", seen="port=refit")
        if self.limit is not None and self.port != "refit":
            fix = f"write {self.source}:port=refit,range={self.limit:g}"
            raise UsageError("a range belongs to a refitted polynomial", seen=f"range={self.limit:g}", fix=fix)
        if self.port == "gelu":
            raise UsageError(
                "a GELU polynomial in the place of SiLU is another model, not an approximation",
                seen=f"{self.source}:port=gelu (mean error 0.107, largest 0.19 on [-5, 5])",
                fix="use port=sigmoid or port=refit",
            )

    @property
    def label(self) -> str:
        given: dict[str, object] = {"port": self.port} if self.port else {}
        given |= {"range": self.limit} if self.limit is not None else {}
        given |= {key: value for key, value, usual in self._switches() if value != usual}
        return written(self.source, given, self.layers)

    def _switches(self) -> list[tuple[str, str, str]]:
        return [("softmax", self.softmax, "yes"), ("norm", self.norm, "no"), ("clamp", self.clamp, "yes")]

    def notes(self, subject: Subject) -> list[str]:
        kind = activation_kind(subject.layers[0].activation)
        _, note = self.activation(kind)
        lines = [f"{SOURCES[self.source].title}: {note}"]
        if self.softmax == "yes":
            lines.append("softmax: the source's exponential after subtracting the maximum, exact division")
        if self.source == "nexus" and self.norm == "no":
            lines.append("RMS norms exact (the source's 1/sqrt has a range made for its own model; norm=yes for it)")
        return lines

    def activation(self, kind: str) -> tuple[Function, str]:
        """The function for a model whose activation computes ``kind``, and one clause that names the port.

        Raises:
            ApproximationError: for an activation that no port exists for.
        """
        source = SOURCES[self.source]
        if kind in ("gelu", "gelu_tanh"):
            gelu = partial(poly.nexus_gelu, clamp=self.clamp == "yes") if self.source == "nexus" else source.gelu
            return gelu, "its own GELU"
        if kind != "silu":
            fix = "silu, gelu and gelu_tanh are supported"
            raise ApproximationError(f"{source.title} approximates no such activation", seen=kind, fix=fix)
        if self.port == "refit":
            limit = self.limit if self.limit is not None else source.limit
            fitted = partial(poly.refit_silu, degree=source.degree, limit=limit, even=source.even)
            return fitted, f"SiLU refitted at its degree {source.degree} on [-{limit:g}, {limit:g}]"
        if source.silu is not None and not self.port:
            return source.silu, "its own SiLU"
        return source.by_sigmoid, "SiLU through the sigmoid with its own tanh or exponential (a port)"

    def edits(self, subject: Subject) -> list[Edit]:
        found: list[Edit] = []
        for layer in subject.layers:
            if layer.index not in self.layers:
                continue
            kind = activation_kind(layer.activation)
            function, _ = self.activation(kind)
            limit = self._limit(kind)
            found.append(Edit(layer.index, "activation", _guarded(function, layer.index, self.label, limit)))
            if self.softmax == "yes":
                found.append(Edit(layer.index, "softmax", SOURCES[self.source].exp))
            if self.norm == "yes":
                found.append(Edit(layer.index, "norm", _guarded(poly.nexus_inverse_root, layer.index, self.label, 1e3)))
        return found

    def _limit(self, kind: str) -> float | None:
        """Half-width of the range in which the function is an approximation; None for the whole line."""
        if self.source == "nexus" and kind != "silu":
            return poly.NEXUS_RANGE
        return None


def _guarded(function: Function, layer: int, label: str, limit: float | None) -> Function:
    """A function that says where and why it stopped being finite.

    Raises (when called):
        ApproximationError: for a NaN or an infinity that the input did not hold.
    """
    if limit is None:
        return function
    counted = OutOfRange(limit)

    def checked(x: Tensor) -> Tensor:
        counted.add(layer, x)
        value = function(x)
        if not bool(torch.isfinite(value).all()):
            bad = float((~torch.isfinite(value)).float().mean())
            outside, total, low, high = counted.seen[layer]
            raise ApproximationError(
                f"{label} left its range in layer {layer} and gave no finite number",
                seen=f"values from {low:.3g} to {high:.3g}, range ±{limit:g}; {outside / total:.2%} of all values "
                f"so far outside, {bad:.2%} of this pass not finite",
                fix="use clamp=yes, fewer layers (layers=FIRST-LAST), or a technique without a range",
            )
        return value

    checked.out_of_range = counted  # type: ignore[attr-defined]
    return checked


_YES = Parameter(kind=str, default="yes", choices=("yes", "no"))
_NO = Parameter(kind=str, default="no", choices=("yes", "no"))
_PORT = Parameter(kind=str, default="", choices=(*PORTS, "gelu"))
_LIMIT = Parameter(kind=float, default=None, low=0.5, high=64.0)


def _make(source: str) -> Callable[..., Polynomial]:
    def make(**values: object) -> Polynomial:
        values["limit"] = values.pop("range", None)
        return Polynomial(source=source, **values)  # type: ignore[arg-type]

    return make


def _entry(source: str) -> Entry:
    parameters = {"port": _PORT, "range": _LIMIT, "softmax": _YES, "layers": LAYERS}
    if source == "nexus":
        parameters |= {"norm": _NO, "clamp": _YES}
    return Entry(_make(source), parameters)


ENTRIES = {source: _entry(source) for source in SOURCES}
