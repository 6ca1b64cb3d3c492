"""Noise in the place of an approximation: Gaussian before the up projection, Laplace before the down projection.

A draw depends on (seed, layer, site, position, token id, in training the step) and on nothing else: not on the batch,
its padding, a shared prefix, the order of calls, or a recomputation under gradient checkpointing. Rows of noise are
windows into one seeded pool of 2^22 values, chosen by a hash, so that adding noise costs a copy.

Covered: the study's surrogate, by layer range. Not covered: noise in attention; the placement of the authors' released
code (every norm's output), which disagrees with their formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Parameter, written
from trimtab.approximation.sites import Site
from trimtab.approximation.technique import Edit, Rows, Subject
from trimtab.errors import UsageError

POOL = 1 << 22
HELD = 8  # pools kept at once, 16 MB each on its device: both sites of four seeds


@dataclass(frozen=True)
class Noise:
    """``up``: standard deviation of the Gaussian; ``down``: scale of the Laplace (its standard deviation is sqrt(2)
    times that)."""

    up: float = 0.0
    down: float = 0.0
    seed: int = 0
    layers: LayerRange = ALL_LAYERS

    whole_rows = False

    def __post_init__(self) -> None:
        if self.up == 0.0 and self.down == 0.0:
            raise UsageError("noise of no size", seen=self.label, fix="write, say, noise:up=0.05 or noise:down=0.02")

    @property
    def label(self) -> str:
        given: dict[str, object] = {"up": self.up} if self.up else {}
        given |= {"down": self.down} if self.down else {}
        return written("noise", given | {"seed": self.seed}, self.layers)

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return [f"noise: the same draw for the same token at the same place, seed {self.seed}"]

    def edits(self, subject: Subject) -> list[Edit]:
        sizes: list[tuple[Site, float]] = [("up", self.up), ("down", self.down)]
        return [
            Edit(layer.index, site, add_noise(site, scale, self.seed, layer.index, subject.rows))
            for layer in subject.layers
            if layer.index in self.layers
            for site, scale in sizes
            if scale > 0.0
        ]


def add_noise(site: Site, scale: float, seed: int, layer: int, rows: Rows) -> Callable[[Tensor], Tensor]:
    """A function that adds this site's noise to x (... x channels), drawn in float32."""
    salt = _mix(torch.tensor((seed * 1_000_003 + layer) * 2 + (site == "down")))

    def noisy(x: Tensor) -> Tensor:
        turn = _mix(salt + 7_919 * rows.draw).to(x.device)
        starts = _mix(_row_keys(x, rows) ^ turn).remainder(POOL - x.shape[-1])
        pool = _held_pool(site, seed, x.device)
        drawn = pool.unfold(0, x.shape[-1], 1)[starts]  # flat tokens x channels
        return x + (scale * drawn).reshape(x.shape).to(x.dtype)

    return noisy


def _row_keys(x: Tensor, rows: Rows) -> Tensor:
    """One number for each token of x (flattened), from its position and id."""
    count = x.numel() // x.shape[-1]
    if rows.positions is None or rows.ids is None:
        return _mix(torch.arange(count, device=x.device))
    keys = _mix(rows.positions.reshape(-1).to(x.device) * 1_048_583 + rows.ids.reshape(-1).to(x.device))
    return keys[rows.selected] if rows.selected is not None else keys


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of whole numbers (a multiplicative hash of 31 bits, twice); the result is not negative."""
    x = x.long()
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
    return x ^ (x >> 15)


@lru_cache(maxsize=HELD)
def _held_pool(site: Site, seed: int, device: torch.device) -> Tensor:
    """The pool on a device: drawn on the CPU, so that a seed means the same everywhere, and copied once."""
    return _pool(site, seed).to(device)


def _pool(site: Site, seed: int) -> Tensor:
    """Standard Gaussian values for "up", standard Laplace ones (scale 1) for "down"."""
    generator = torch.Generator().manual_seed(seed * 2 + (site == "down"))
    if site == "up":
        return torch.randn(POOL, generator=generator)
    uniform = torch.rand(POOL, generator=generator, dtype=torch.float64) - 0.5
    return (-torch.sign(uniform) * torch.log1p(-2.0 * uniform.abs().clamp_max(0.5 - 2**-54))).float()


_SIZE = Parameter(kind=float, default=0.0, low=0.0, high=math.inf)
ENTRIES = {
    "noise": Entry(
        Noise,
        {"up": _SIZE, "down": _SIZE, "seed": Parameter(kind=int, default=0, low=0, high=2**31 - 1), "layers": LAYERS},
    )
}
