"""What counts as worse, and by how much: the numbers that a person sets before looking at the data.

Covered: error rates, margins for each axis, loading from a flat YAML file. Not covered: what follows from them
(``gate.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trimtab.comparison.records import Axis
from trimtab.errors import UsageError
from trimtab.flat_yaml import read_flat

_MARGIN_PREFIX = "margin."
_NUMBERS = ("alpha", "power", "margin", "relative_margin", "max_lost")
_WORDS = {"test": ("exact", "mid-p"), "cluster": ("auto", "category", "none")}
KNOWN_KEYS = (*_NUMBERS, f"{_MARGIN_PREFIX}<axis>", *_WORDS)


@dataclass(frozen=True)
class Policy:
    """Rules of one comparison.

    Attributes:
        alpha: chance of any false alarm over all axes, and 1 - alpha the level of every interval; in (0, 1).
        power: the chance that "smallest difference that could have been found" refers to; in (0, 1).
        margin: how much worse a binary axis may be and still pass, in absolute share (0.05 is 5 points); in (0, 1).
        relative_margin: the same for continuous axes without a margin of their own, relative: for "perplexity" the
            factor is 1 + this, for others this times the absolute mean of the base ("structeval" with a mean of 0:
            ``margin``).
        margins: margins by axis name, in the axis' own unit (share; nats for perplexity); "compliance" also covers
            "compliance:<data set>" where that has none of its own.
        max_lost: largest share of the base's scored items that the candidate may lack or leave unscored before a pass
            turns into "not enough evidence"; in [0, 1).
        test: "exact" McNemar, or "mid-p" (more power, no guarantee; ``docs/results/statistics.md``).
        cluster: what counts as one observation. "auto": an item, with all its draws where it was answered several
            times; "category": a category of items (needs ten or so of them); "none": every answer.

    Raises:
        UsageError: for a number outside its range, or an unknown word.
    """

    alpha: float = 0.05
    power: float = 0.8
    margin: float = 0.05
    relative_margin: float = 0.05
    margins: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    max_lost: float = 0.05
    test: str = "exact"
    cluster: str = "auto"

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                fix = f"use one of: {', '.join(words)}"
                raise UsageError(f"unknown {name} in the policy", seen=getattr(self, name), fix=fix)
        for name in ("alpha", "power", "margin"):
            _check(name, getattr(self, name), 0.0 < getattr(self, name) < 1.0, "strictly between 0 and 1")
        _check("max_lost", self.max_lost, 0.0 <= self.max_lost < 1.0, "at least 0 and below 1")
        _check("relative_margin", self.relative_margin, 0.0 < self.relative_margin < math.inf, "positive")
        for axis, value in self.margins.items():
            _check(_MARGIN_PREFIX + axis, value, 0.0 < value < math.inf, "positive")
        object.__setattr__(self, "margins", MappingProxyType(dict(self.margins)))

    def margin_for(self, axis: Axis, base_mean: float) -> float:
        """The margin of an axis, in the unit of its values.

        Args:
            axis: the axis as measured on the base.
            base_mean: mean value of the base, used only for a relative margin.

        Raises:
            UsageError: where the margin is relative to a mean of zero of a quantity that has no natural unit.
        """
        family = axis.name.split(":", 1)[0]
        named = self.margins.get(axis.name, self.margins.get(family))
        if named is not None:
            return named
        if axis.kind == "binary":
            return self.margin
        if family == "perplexity":
            return math.log1p(self.relative_margin)  # values are log-likelihoods, so a factor is a sum
        margin = self.relative_margin * abs(base_mean)
        if margin == 0.0 and family == "structeval":
            return self.margin  # its score is a share too
        if margin == 0.0:
            raise UsageError(
                f"axis {axis.name!r} has a relative margin, but the base mean is 0",
                seen=base_mean,
                fix=f"set an absolute margin: {_MARGIN_PREFIX}{axis.name}: 0.1",
            )
        return margin


def policy_from_mapping(settings: Mapping[str, Any]) -> Policy:
    """Make a policy from flat settings such as ``{"alpha": 0.01, "margin.compliance": 0.02}``.

    Raises:
        UsageError: for an unknown key (echoed, with the known ones) or a value that is not a number in range.
    """
    numbers: dict[str, float] = {}
    margins: dict[str, float] = {}
    words: dict[str, str] = {}
    for key, value in settings.items():
        if key in _WORDS:
            words[key] = str(value)
            continue
        if not isinstance(key, str) or not (key in _NUMBERS or _is_margin(key)):
            raise UsageError(
                "unknown key in the policy", seen=repr(key), fix=f"use only these keys: {', '.join(KNOWN_KEYS)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{key} must be a number", seen=repr(value), fix=f"write, say, {key}: 0.05")
        if key in _NUMBERS:
            numbers[key] = float(value)
        else:
            margins[key.removeprefix(_MARGIN_PREFIX)] = float(value)
    return Policy(**numbers, **words, margins=margins)  # type: ignore[arg-type]


def load_policy(path: str | Path) -> Policy:
    """Read a policy from a flat YAML file; an empty file gives the defaults.

    Raises:
        DataError: where the file is missing or is not YAML. UsageError: where it holds anything but known numbers, or a
            key twice.
    """
    return policy_from_mapping(read_flat(Path(path), "the policy", "alpha: 0.05"))


def _is_margin(key: str) -> bool:
    return key.startswith(_MARGIN_PREFIX) and len(key) > len(_MARGIN_PREFIX)


def _check(name: str, value: float, good: bool, range_: str) -> None:
    if not good:
        raise UsageError(f"{name} must be {range_}", seen=value, fix=f"change {name} in the policy")
