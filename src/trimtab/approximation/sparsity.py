"""TEAL and CATS: small activations are zeroed.

TEAL (ICLR 2025): at the input of every linear map, x -> x [|x| > t], t from a calibration histogram so that a share p
is zeroed if the values are symmetric about zero, as the source assumes. In prefill the source zeroes only the last
half of a prompt's tokens; ``prefill`` sets that share. CATS (2024): the gate's activation, zeroed below the
p-quantile of its magnitude.

Covered: uniform p; greedy p for each site of a layer (TEAL's block-wise greedy rule, on our four sites instead of seven
projections). Not covered: the sparse kernels, so no speed is gained here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.approximation.calibration import Calibration
from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Named, Parameter, written
from trimtab.approximation.sites import INPUT_SITES, LayerSites, Site
from trimtab.approximation.technique import Edit, Rows, Subject

GREEDY_STEP = 0.05


@dataclass(frozen=True)
class Teal:
    """``share`` of the values zeroed; ``prefill``: share of a prompt's last tokens that are touched.

    ``threshold``: "histogram" as the source, or "magnitude", exact whatever the distribution.
    ``split``: "uniform", or "greedy": more where a layer's output suffers least.
    """

    share: float
    prefill: float = 0.5
    split: str = "uniform"
    threshold: str = "histogram"
    layers: LayerRange = ALL_LAYERS

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
        found = []
        for layer in subject.layers:
            if layer.index not in self.layers:
                continue
            shares = dict.fromkeys(INPUT_SITES, self.share)
            if self.split == "greedy":
                shares = greedy_shares(layer, calibration, self.share)
            for site, share in shares.items():
                limit = self._limit(calibration, layer.index, site, share)
                found.append(Edit(layer.index, site, zero_below(limit, self.prefill, subject.rows)))
        return found

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
        return torch.where(late.reshape(*x.shape[:-1], 1), kept, x)

    return cut


def late_tokens(real: Tensor, share: float) -> Tensor:
    """rows x width: whether a token is among the last ``share`` of its row's real tokens (the count rounded down)."""
    count = real.sum(1, keepdim=True)
    place = real.cumsum(1)  # 1 for a row's first real token
    return real & (place > count - (count * share).floor())


def greedy_shares(layer: LayerSites, calibration: Calibration, share: float) -> dict[Site, float]:
    """Sparsity of each site, the weighted mean being ``share``: TEAL's greedy rule on one layer.

    Starting from none, the site is raised by a step whose zeroed energy, relative to what reaches its linear maps,
    grows least for the multiplications it saves, until the layer's mean is reached. The source measures the layer's
    output error; we take the energy that is zeroed at the site, which needs no further passes.
    """
    sizes = _site_sizes(layer)
    total = sum(sizes.values())
    shares: dict[Site, float] = dict.fromkeys(sizes, 0.0)
    while sum(shares[site] * sizes[site] for site in sizes) < share * total - 1e-9:
        costs = {
            site: _energy(calibration, layer.index, site, min(0.99, shares[site] + GREEDY_STEP))
            for site in sizes
            if shares[site] < 0.99
        }
        chosen = min(costs, key=lambda site: (costs[site], site))
        room = (share * total - sum(shares[site] * sizes[site] for site in sizes)) / sizes[chosen]
        shares[chosen] = min(0.99, shares[chosen] + min(GREEDY_STEP, room))
    return shares


def _site_sizes(layer: LayerSites) -> dict[Site, float]:
    """Weights behind each site: multiplications saved by one percent of sparsity."""
    groups: dict[Site, tuple[object, ...]] = {
        "attn_in": layer.attention_in,
        "attn_out": (layer.attention_out,),
        "up": layer.up,
        "down": (layer.down,) if layer.down is not None else (),
    }
    sizes = {
        site: float(sum(part.in_features * part.out_features for part in parts))  # type: ignore[attr-defined]
        for site, parts in groups.items()
    }
    if layer.experts:
        up, down = layer.mlp.gate_up_proj, layer.mlp.down_proj
        sizes |= {"up": float(up.numel()), "down": float(down.numel())}  # type: ignore[operator]
    return sizes


def _energy(calibration: Calibration, layer: int, site: Site, share: float) -> float:
    """Share of the squared values that is zeroed at this sparsity."""
    magnitudes = calibration.values[layer, site].abs().sort().values.double() ** 2
    count = int(share * len(magnitudes))
    return float(magnitudes[:count].sum() / magnitudes.sum().clamp_min(1e-30))


_SHARE = Parameter(kind=float, low=0.0, high=1.0, open_low=True, open_high=True, required=True)
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
