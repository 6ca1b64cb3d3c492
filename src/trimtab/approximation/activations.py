"""Which polynomial a model's activation function gets, under which port, and within which range.

Every source but BumbleBee and PUMA states a GELU only. For a SiLU model there are two honest ports: through the
sigmoid with the source's own tanh or exponential ("sigmoid"), or a polynomial refitted to SiLU at the source's degree
and range ("refit"). Putting the GELU polynomial in for SiLU unchanged is another model (mean error 0.107 on [-5, 5])
and is refused.

Covered: activation, the softmax's exponential, NEXUS's 1/sqrt in a layer's RMS norms where asked for; all of them
guarded (``ranges.py``). Not covered: what the sources do elsewhere in their protocols (comparisons, argmax, embedding
look-up), the norms of queries and keys and the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from trimtab.approximation import polynomials as poly
from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Parameter, number, written
from trimtab.approximation.ranges import Guarded, Span
from trimtab.approximation.sites import Site, activation_kind
from trimtab.approximation.technique import Edit, Subject
from trimtab.errors import ApproximationError, UsageError

Function = Callable[[Tensor], Tensor]
PORTS = ("sigmoid", "refit")


NORM_SPAN = Span(*poly.NEXUS_ROOT_RANGE, ends=True)
EXP_SPAN = Span(-100.0, 0.0)


class Source(NamedTuple):
    """What one paper gives.

    Attributes:
        title: as in notes. gelu, exp: its own. silu: its own, or our port through the sigmoid where ``route`` says with
            what of its own that port is made ("": its own SiLU).
        degree, limit, even: of a refit. gelu_reach, silu_reach: |x| up to which the polynomial (or table) is used.
    """

    title: str
    gelu: Function
    silu: Function
    route: str
    exp: Function
    degree: int
    limit: float
    even: bool
    gelu_reach: float
    silu_reach: float


def _iron_exp(x: Tensor) -> Tensor:
    return poly.iron_exp_negative(-x)


SOURCES = {
    "iron": Source("Iron", poly.iron_gelu, poly.iron_silu, "sigmoid", _iron_exp, 0, 0.0, False, 8.0, 4096.0),
    "bolt": Source("BOLT", poly.bolt_gelu, poly.bolt_silu, "tanh", poly.bolt_exp, 4, 2.7, False, 2.7, 5.71),
    "bumblebee": Source(
        "BumbleBee", poly.bumblebee_gelu, poly.bumblebee_silu, "", poly.bumblebee_exp, 4, 3.0, False, 3.0, 8.0
    ),
    "nexus": Source(
        *("NEXUS", poly.nexus_gelu, poly.nexus_silu, "exponential and reciprocal", poly.nexus_exp, 12, 3.5, True),
        *(poly.NEXUS_RANGE, 128.0),
    ),
    "puma": Source("PUMA", poly.bumblebee_gelu, poly.puma_silu, "", poly.bumblebee_exp, 6, 4.0, False, 3.0, 8.0),
}


@dataclass(frozen=True)
class Polynomial:
    """One source on one model.

    Attributes:
        source: key of ``SOURCES``. port: for SiLU; "" for the source's own, through the sigmoid where it has none.
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
        if self.port == "sigmoid" and not SOURCES[self.source].route:
            raise UsageError(
                f"{SOURCES[self.source].title} states a SiLU of its own, so there is no port through the sigmoid",
                seen=f"{self.source}:port=sigmoid",
                fix=f"write {self.source} for its own, or {self.source}:port=refit",
            )
        if self.port == "refit" and self.source == "iron":
            raise UsageError(
                "Iron is tables, not a polynomial: there is nothing to refit",
                seen="port=refit",
                fix="leave port=refit out",
            )
        if self.limit is not None and self.port != "refit":
            given = f"range={number(self.limit)}"
            fix = f"write {self.source}:port=refit,{given}"
            raise UsageError("a range belongs to a refitted polynomial", seen=given, fix=fix)
        if self.port == "gelu":
            raise UsageError(
                "a GELU polynomial in the place of SiLU is another model, not an approximation",
                seen=f"{self.source}:port=gelu (mean error 0.107, largest 0.19 on [-5, 5])",
                fix="use port=sigmoid or port=refit",
            )

    @property
    def replaces(self) -> tuple[Site, ...]:
        """Functions that it puts another in the place of; no other technique can do so too."""
        return ("activation", "softmax") if self.softmax == "yes" else ("activation",)

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
        elif self.source == "nexus":
            what = f"within 1 % for sums of squares of {NORM_SPAN.text()}, wrong outside"
            lines.append(f"the layers' RMS norms by the source's 1/sqrt, {what}; other norms exact")
        return lines

    def activation(self, kind: str) -> tuple[Function, str]:
        """The function for a model whose activation computes ``kind``, and one clause that names the port.

        Raises:
            ApproximationError: for an activation that no port exists for; a parameter that would change nothing.
        """
        source = SOURCES[self.source]
        self._check_used(kind)
        if kind in ("gelu", "gelu_tanh"):
            gelu = partial(poly.nexus_gelu, clamp=self.clamp == "yes") if self.source == "nexus" else source.gelu
            own = "its own GELU" if self.source != "puma" else "BumbleBee's GELU (it states none of its own)"
            return gelu, own
        if kind != "silu":
            fix = "silu, gelu and gelu_tanh are supported"
            raise ApproximationError(f"{source.title} approximates no such activation", seen=kind, fix=fix)
        if self.port == "refit":
            limit = self._refit_limit()
            fitted = partial(poly.refit_silu, degree=source.degree, limit=limit, even=source.even)
            return fitted, f"SiLU refitted at its degree {source.degree} on [-{limit:g}, {limit:g}] (a port)"
        if not source.route:
            return source.silu, "its own SiLU"
        return source.silu, f"SiLU through the sigmoid, with its own {source.route} (a port)"

    def _check_used(self, kind: str) -> None:
        """Refuse a parameter that this activation has no use for: its numbers would be another name's."""
        if kind in ("gelu", "gelu_tanh") and self.port:
            given = f"port={self.port}" + (f",range={number(self.limit)}" if self.limit is not None else "")
            what, named = "a port is for SiLU, and this model's activation needs none", given
        elif kind == "silu" and self.clamp != "yes":
            what, named = "clamp is for NEXUS' GELU, and this model's activation is another", f"clamp={self.clamp}"
        else:
            return
        raise ApproximationError(f"{self.label}: {what}", seen=f"{named} on {kind}", fix=f"leave {named} out")

    def edits(self, subject: Subject) -> list[Edit]:
        found: list[Edit] = []
        exp = SOURCES[self.source].exp
        for layer in subject.layers:
            if layer.index not in self.layers:
                continue
            kind = activation_kind(layer.activation)
            function, _ = self.activation(kind)
            found.append(self._edit(subject, layer.index, "activation", function, self._span(kind)))
            if self.softmax == "yes":
                found.append(self._edit(subject, layer.index, "softmax", exp, EXP_SPAN))
            if self.norm == "yes":
                found.append(self._edit(subject, layer.index, "norm", poly.nexus_inverse_root, NORM_SPAN))
        return found

    def _edit(self, subject: Subject, layer: int, site: Site, function: Function, span: Span) -> Edit:
        fix = "use fewer layers (layers=FIRST-LAST) or a technique without a range"
        if self.source == "nexus":
            fix = {"activation": f"use clamp=yes, {fix[4:]}", "norm": f"leave norm=yes out, {fix}"}.get(site, fix)
        return Edit(layer, site, Guarded(function, self.label, layer, site, span, fix, subject.rows))

    def _span(self, kind: str) -> Span:
        source = SOURCES[self.source]
        if kind != "silu":
            return Span(-source.gelu_reach, source.gelu_reach, ends=self.source == "nexus")
        reach = self._refit_limit() if self.port == "refit" else source.silu_reach
        return Span(-reach, reach)

    def _refit_limit(self) -> float:
        return self.limit if self.limit is not None else SOURCES[self.source].limit


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
