"""What a technique says of its name: parameters with their ranges, the layers, and the canonical way to write it.

Covered: the vocabulary that the files of techniques share. Not covered: reading names (``naming.py``), which knows all
techniques, as this file knows none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from trimtab.approximation.sites import Site
from trimtab.approximation.technique import Technique


class LayerRange(NamedTuple):
    """First and last layer, both included; ``last`` None means to the end."""

    first: int = 0
    last: int | None = None

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and layer >= self.first and (self.last is None or layer <= self.last)

    def meets(self, other: LayerRange) -> bool:
        """Whether a layer may be in both."""
        return max(self.first, other.first) <= min(math.inf if end is None else end for end in (self.last, other.last))

    def text(self) -> str:
        """As in a name; empty for all layers."""
        if self == LayerRange():
            return ""
        return f"layers={self.first}-{'' if self.last is None else self.last}"


ALL_LAYERS = LayerRange()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a technique.

    Attributes:
        kind: float, int, str or LayerRange. default: used where nothing is given.
        low, high: allowed range of a number; ``open_low``, ``open_high``: the bound itself is not allowed.
        choices: allowed words.
        required: there is no default; ``example`` is what a message then proposes.
    """

    kind: type = float
    default: object = None
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    required: bool = False
    example: str = ""


class Entry(NamedTuple):
    """A technique's name: what makes it, and its parameters in order."""

    make: Callable[..., Technique]
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, object] = {}


LAYERS = Parameter(kind=LayerRange, default=ALL_LAYERS)


def written(name: str, parts: Mapping[str, object], layers: LayerRange) -> str:
    """A canonical name: the given values as ``key=value``, layers last."""
    items = [f"{key}={number(value) if isinstance(value, float) else value}" for key, value in parts.items()]
    items += filter(None, [layers.text()])
    return name + (":" + ",".join(items) if items else "")


def number(value: float) -> str:
    """The shortest text that reads back as the same number, without a "+", which joins techniques."""
    short = f"{value:g}"
    text = short if float(short) == value else repr(value).removesuffix(".0")
    return text.replace("e+", "e")


class Named:
    """Base of the techniques (frozen dataclasses) whose label shows every parameter: all tokens are treated alike.

    ``head`` is the name; a parameter in braces is part of it ("a{bits}" writes a8) and is not written again.
    ``silent``: values that are not written. ``kind``, ``sites``: what it does, and where; a name does one kind of thing
    at a place once (``naming.py``).
    """

    head: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    sites: ClassVar[tuple[Site, ...]] = ()
    silent: ClassVar[Mapping[str, object]] = {}
    whole_rows: ClassVar[bool] = False
    layers: LayerRange

    @property
    def label(self) -> str:
        """The string that makes the same technique again, every default written out but the silent ones."""
        own: Any = self
        given = {part.name: getattr(self, part.name) for part in fields(own) if part.name != "layers"}
        rest = {
            name: value
            for name, value in given.items()
            if f"{{{name}}}" not in self.head and self.silent.get(name) != value
        }
        return written(self.head.format(**given), rest, self.layers)
