"""Bring two measurements of one axis together, item by item.

Covered: pairing on item ids, what is missing or unscored on either side, and the checks without which a comparison
means nothing (same judge, same data, same question). Not covered: statistics (``gate.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.comparison.records import Axis, Item
from trimtab.errors import DataError


@dataclass(frozen=True)
class Pairing:
    """Items of two runs, joined on their id, in the order of the base.

    Attributes:
        scored: pairs with a value on both sides; only these enter the statistics.
        unscored: pairs that lack a value on at least one side.
        missing_in_base, missing_in_candidate: ids that the other side has.
    """

    scored: tuple[tuple[Item, Item], ...]
    unscored: tuple[tuple[Item, Item], ...]
    missing_in_base: tuple[str, ...]
    missing_in_candidate: tuple[str, ...]

    @property
    def unscored_base(self) -> int:
        """Pairs without a value in the base."""
        return sum(base.value is None for base, _ in self.unscored)

    @property
    def unscored_candidate(self) -> int:
        """Pairs without a value in the candidate."""
        return sum(candidate.value is None for _, candidate in self.unscored)

    @property
    def lost(self) -> int:
        """Pairs that the base scored and the candidate did not; missing items are not among them."""
        return sum(base.value is not None and candidate.value is None for base, candidate in self.unscored)


def pair_axes(base: Axis, candidate: Axis) -> Pairing:
    """Pair two measurements of one axis by item id.

    Raises:
        DataError: if the sides differ in judge, data set, kind or direction; if an id occurs twice or stands for two
            different prompts; if a value is not 0/1 on a binary axis or not finite; if no item is in both. An empty
            intersection is never a pass.
    """
    _check_same_question(base, candidate)
    first, second = _by_id(base, "base"), _by_id(candidate, "candidate")
    common = [key for key in first if key in second]
    if not common:
        raise DataError(
            f"axis {base.name!r}: base and candidate have no item in common",
            seen=f"{len(first)} and {len(second)} ids, e.g. {next(iter(first), '-')!r} and {next(iter(second), '-')!r}",
            fix="measure both on the same data set",
        )
    pairs = [(first[key], second[key]) for key in common]
    for one, other in pairs:
        if one.prompt != other.prompt:
            raise DataError(
                f"axis {base.name!r}: item {one.id!r} has a different prompt in base and candidate",
                seen=f"{one.prompt[:80]!r} and {other.prompt[:80]!r}",
                fix="measure both on the same data set, with stable ids",
            )
    return Pairing(
        scored=tuple(pair for pair in pairs if _is_scored(pair)),
        unscored=tuple(pair for pair in pairs if not _is_scored(pair)),
        missing_in_base=tuple(key for key in second if key not in first),
        missing_in_candidate=tuple(key for key in first if key not in second),
    )


def _is_scored(pair: tuple[Item, Item]) -> bool:
    return pair[0].value is not None and pair[1].value is not None


def _check_same_question(base: Axis, candidate: Axis) -> None:
    """Different judges or data give a difference that no model made."""
    for what in ("judge", "dataset", "kind", "lower_is_better"):
        ours, theirs = getattr(base, what), getattr(candidate, what)
        if ours != theirs:
            raise DataError(
                f"axis {base.name!r}: {what} differs between base and candidate",
                seen=f"base {ours!r}, candidate {theirs!r}",
                fix=f"measure both with the same {what}",
            )


def _by_id(axis: Axis, side: str) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for item in axis.items:
        if item.id in items:
            raise DataError(
                f"axis {axis.name!r}: an item id occurs twice in the {side}", seen=repr(item.id), fix="make ids unique"
            )
        _check_value(axis, item, side)
        items[item.id] = item
    return items


def _check_value(axis: Axis, item: Item, side: str) -> None:
    if item.value is None:
        return
    allowed = item.value in (0.0, 1.0) if axis.kind == "binary" else math.isfinite(item.value)
    if not allowed:
        wanted = "0 or 1" if axis.kind == "binary" else "a finite number"
        raise DataError(
            f"axis {axis.name!r}: item {item.id!r} of the {side} has a value that is not {wanted}",
            seen=item.value,
            fix="use None for an item that could not be scored",
        )
