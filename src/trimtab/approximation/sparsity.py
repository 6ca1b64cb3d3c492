"""TEAL and CATS: small activations are zeroed.

TEAL (ICLR 2025): at the input of every linear map, x -> x [|x| > t], t from a calibration histogram so that a share p
is zeroed if the values are symmetric about zero, as the source assumes. In prefill the source zeroes only the last
half of a prompt's tokens; ``prefill`` sets that share. CATS (2024): the gate's activation, zeroed below the
p-quantile of its magnitude.

Covered: uniform p; greedy p for each site of a layer (TEAL's block-wise rule, ``greedy.py``). Not covered: the sparse
kernels, so no speed is gained here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.approximation.calibration import Calibration
from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Named, Parameter, written
from trimtab.approximation.greedy import Shares, greedy_shares
from trimtab.approximation.sites import INPUT_SITES, LayerSites, Site
from trimtab.approximation.technique import Edit, Rows, Subject


@dataclass(frozen=True)
class Teal:
    """``share`` of the values zeroed; ``prefill``: share of a prompt's last tokens that are touched.

    ``threshold``: "histogram" as the source, or "magnitude", exact whatever the distribution.
    ``split``: "uniform", or "greedy": more where a layer's output suffers least; ``share`` is then the layer's mean.
    """

    share: float
    prefill: float = 0.5
    split: str = "uniform"
    threshold: str = "histogram"
    layers: LayerRange = ALL_LAYERS

    kind, sites = "zeroing", INPUT_SITES

    @property
    def whole_rows(self) -> bool:
        return self.prefill < 1.0

    @property
    def label(self) -> str:
        given: dict[str, object] = {"share": self.share, "prefill": self.prefill}
        given |= {"split": self.split} if self.split != "uniform" else {}
        given |= {"threshold": self.threshold} if self.threshold != "histogram" else {}
        return written("teal", given, self.layers)

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return [
            f"TEAL: in prefill the last {self.prefill:.0%} of a prompt's tokens are sparsified (source: 50 %)",
            f"TEAL: thresholds by {self.threshold}, {self.split}",
        ]

    def edits(self, subject: Subject) -> list[Edit]:
        calibration = subject.calibration()
        own = [layer for layer in subject.layers if layer.index in self.layers]

        def cuts(layer: LayerSites, shares: Shares, rows: Rows, prefill: float = 1.0) -> list[Edit]:
            limits = {site: self._limit(calibration, layer.index, site, share) for site, share in shares.items()}
            return [Edit(layer.index, site, zero_below(limit, prefill, rows)) for site, limit in limits.items()]

        if self.split == "greedy":
            shares = greedy_shares(subject, own, self.share, cuts)
        else:
            shares = {layer.index: dict.fromkeys(INPUT_SITES, self.share) for layer in own}
        return [edit for layer in own for edit in cuts(layer, shares[layer.index], subject.rows, self.prefill)]

    def _limit(self, calibration: Calibration, layer: int, site: Site, share: float) -> float:
        if share <= 0.0:
            return -1.0
        if self.threshold == "magnitude":
            return calibration.magnitude(layer, site, share)
        # Stored in half precision, as the source does.
        return float(torch.tensor(calibration.quantile(layer, site, 0.5 + share / 2)).half())


@dataclass(frozen=True)
class Cats(Named):
    """``share`` of the gate's activations zeroed."""

    share: float
    layers: LayerRange = ALL_LAYERS

    head = "cats"
    kind, sites = "zeroing", ("activation",)
    replaces = ("activation",)

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return ["CATS: the gate's activation, all tokens"]

    def edits(self, subject: Subject) -> list[Edit]:
        calibration = subject.calibration()
        return [
            Edit(
                layer.index,
                "activation",
                _activated(layer, calibration.magnitude(layer.index, "activation", self.share)),
            )
            for layer in subject.layers
            if layer.index in self.layers
        ]


def _activated(layer: LayerSites, limit: float) -> Callable[[Tensor], Tensor]:
    def cut(x: Tensor) -> Tensor:
        value: Tensor = layer.activation.forward(x)
        return value * (value.abs() > limit)

    return cut


def zero_below(limit: float, prefill: float, rows: Rows) -> Callable[[Tensor], Tensor]:
    """Zero what is at most ``limit`` in magnitude; in a prompt only in the last ``prefill`` of each row's tokens."""

    def cut(x: Tensor) -> Tensor:
        kept = x * (x.abs() > limit)
        if prefill >= 1.0 or rows.real is None or rows.real.shape[1] == 1:
            return kept
        prompt = rows.real.shape[1] - rows.decoded
        late = rows.real.clone()
        late[:, :prompt] = late_tokens(rows.real[:, :prompt], prefill)
        late = late.reshape(-1)  # rows x width -> flat
        if rows.selected is not None:
            late = late[rows.selected]
        return torch.where(late.to(x.device).reshape(*x.shape[:-1], 1), kept, x)

    return cut


def late_tokens(real: Tensor, share: float) -> Tensor:
    """rows x width: whether a token is among the last ``share`` of its row's real tokens (the count rounded down)."""
    count = real.sum(1, keepdim=True)
    place = real.cumsum(1)  # 1 for a row's first real token
    return real & (place > count - (count * share).floor())


_SHARE = Parameter(kind=float, low=0.0, high=1.0, open_low=True, open_high=True, required=True, example="0.5")
ENTRIES = {
    "teal": Entry(
        Teal,
        {
            "share": _SHARE,
            "prefill": Parameter(kind=float, default=0.5, low=0.0, high=1.0, open_low=True),
            "split": Parameter(kind=str, default="uniform", choices=("uniform", "greedy")),
            "threshold": Parameter(kind=str, default="histogram", choices=("histogram", "magnitude")),
            "layers": LAYERS,
        },
    ),
    "cats": Entry(Cats, {"share": _SHARE, "layers": LAYERS}),
}
