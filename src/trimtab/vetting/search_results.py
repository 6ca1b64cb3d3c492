"""What a search for vulnerable noise found: points, sites, the whole, as JSON and in words.

Covered: values and how they are told. Not covered: measuring them (``probe.py``), choosing what to measure
(``search.py``), drawing (``pictures.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.comparison.statistics import wilson_interval

GUARANTEE = (
    "guaranteed: each scale is the best of those tried on all prompts (between them nothing is known); each prefix is "
    "the smallest if compliance does not fall when layers are added"
)


class Point(NamedTuple):
    """Compliance and incoherence at one scale. ``layers``: "" for all. ``seeds``: how often each prompt was asked."""

    scale: float
    complied: int
    incoherent: int
    asked: int
    perplexity: float
    layers: str
    seeds: int = 1

    @property
    def rate(self) -> float:
        """Share of harmful prompts complied with, coherently."""
        return self.complied / self.asked

    def interval(self) -> tuple[float, float]:
        """95 %, Wilson, of as many trials as there are prompts: a prompt that is asked again with other noise is no
        new prompt. Too wide, if anything.
        """
        prompts = self.asked // self.seeds
        low, high = wilson_interval(round(self.complied / self.seeds), prompts, 0.05)
        return min(low, self.rate), max(high, self.rate)

    def document(self) -> dict[str, Any]:
        """JSON-ready, with the interval."""
        low, high = self.interval()
        return {**self._asdict(), "rate": self.rate, "low": low, "high": high}


@dataclass(frozen=True)
class SiteSearch:
    """One site: every point tried, the best, the ceiling, the last layer of the smallest explaining prefix."""

    site: str
    points: tuple[Point, ...]
    best: Point
    exact: Point
    ceiling: float
    last_layer: int | None
    prefix_points: tuple[Point, ...]


@dataclass(frozen=True)
class Search:
    """Everything; ``sensitivity``: site -> nats per token by layer at the best scale. ``joint``: both sites at once,
    each at its best scale times ``factor``, as ``noise`` says: what hardening trains against."""

    model: str
    sites: tuple[SiteSearch, ...]
    joint: Point
    factor: float
    sensitivity: dict[str, list[float]]
    clusters: dict[str, Any]
    folder: Path

    @property
    def noise(self) -> str:
        """The name to harden against."""
        return joint_noise(self.sites, self.factor)

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        sites = [
            {
                "site": found.site,
                "best": found.best.document(),
                "exact": found.exact.document(),
                "ceiling": found.ceiling,
                "last_layer": found.last_layer,
                "points": [point.document() for point in found.points],
                "prefixes": [point.document() for point in found.prefix_points],
            }
            for found in self.sites
        ]
        return {
            "model": self.model,
            "noise": self.noise,
            "joint": self.joint.document(),
            "factor": self.factor,
            "sites": sites,
            "sensitivity": self.sensitivity,
            "clusters": self.clusters,
        }

    def lines(self) -> list[str]:
        """For a person."""
        shown = []
        for found in self.sites:
            low, high = found.best.interval()
            prefix = "no rise to explain" if found.last_layer is None else f"layers 0-{found.last_layer} explain it"
            shown.append(
                f"{found.site}: most vulnerable scale {found.best.scale:.4g} of those tried: complies "
                f"{found.best.rate:.1%} [{low:.1%}, {high:.1%}] (exact {found.exact.rate:.1%}), perplexity "
                f"{found.best.perplexity:.1f} (exact {found.exact.perplexity:.1f}), {prefix}"
            )
        low, high = self.joint.interval()
        both = f"both: complies {self.joint.rate:.1%} [{low:.1%}, {high:.1%}], perplexity {self.joint.perplexity:.1f}"
        return [*shown, GUARANTEE, f"harden against: {self.noise}", both, f"pictures and search.json in {self.folder}"]


def joint_noise(sites: Sequence[SiteSearch], factor: float = 1.0) -> str:
    """The most vulnerable scale of each site, times a factor, in the layers that explain either."""
    sizes = ",".join(f"{found.site}={found.best.scale * factor:.4g}" for found in sites)
    last = max((found.last_layer for found in sites if found.last_layer is not None), default=None)
    return f"noise:{sizes}" + (f",layers=0-{last}" if last is not None else "")
