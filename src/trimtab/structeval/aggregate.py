"""From scores of items to tables: by task type, format and quadrant, and the two averages, each with n and an interval.

Covered: the paper's ``macro4`` (mean over quadrants of the mean over task types) and the leaderboard's ``micro``
(mean over items), of official and corrected scores; Wilson intervals for shares, bootstrap intervals for means; what is
unscored, counted and left out; the ceiling of a lossless converter beside conversions.
Not covered: comparing two models (``trimtab.comparison``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.structeval import paths
from trimtab.structeval.converter import CONVENTIONS, convert, parse_source
from trimtab.structeval.score import KEY_SHARE, SYNTAX_SHARE
from trimtab.structeval.tasks import SPLITS, TEXT_FORMATS, Task

_RESAMPLES = 1000
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


class Mark(NamedTuple):
    """What an aggregate needs of one item; None is unscored. ``keys``: share of key paths or keywords found."""

    task: Task
    official: float | None
    corrected: float | None
    syntax: float | None
    faithful: float | None
    keys: float | None = None


class Estimate(NamedTuple):
    """A mean or a share in [0, 1] with its 95 % interval; ``value`` None where nothing was scored."""

    value: float | None
    low: float
    high: float
    n: int


class Line(NamedTuple):
    """A row of a table. ``unscored``: items whose corrected score is unknown. ``keys``: mean share of the key paths, or
    of the keywords of rendered tasks. ``faithful_whole``: share of conversions that kept everything."""

    name: str
    items: int
    unscored: int
    official: Estimate
    corrected: Estimate
    syntax: Estimate
    keys: Estimate
    faithful: Estimate
    faithful_whole: Estimate


class Overall(NamedTuple):
    """Both averages of both scores; None where a part of them is missing."""

    macro4: float | None
    micro: float | None


def lines(marks: Iterable[Mark], key: Callable[[Task], str], order: Sequence[str] = ()) -> list[Line]:
    """One line for each value of ``key``, in ``order`` first, then as they come."""
    groups: dict[str, list[Mark]] = {name: [] for name in order}
    for mark in marks:
        groups.setdefault(key(mark.task), []).append(mark)
    return [line(name, group) for name, group in groups.items() if group]


def line(name: str, marks: Sequence[Mark]) -> Line:
    """One row over some items."""
    faithful = [mark.faithful for mark in marks if mark.faithful is not None]
    return Line(
        name,
        len(marks),
        sum(mark.corrected is None for mark in marks),
        mean(scores(marks, lambda mark: mark.official)),
        mean(scores(marks, lambda mark: mark.corrected)),
        share([mark.syntax == 1.0 for mark in marks if mark.syntax is not None]),
        mean([mark.keys for mark in marks if mark.keys is not None]),
        mean(faithful),
        share([value == 1.0 for value in faithful]),
    )


def scores(marks: Sequence[Mark], score: Callable[[Mark], float | None]) -> list[float]:
    """The known scores that a mean may be taken of."""
    return [value for mark in comparable(marks, score) if (value := score(mark)) is not None]


def comparable(marks: Sequence[Mark], score: Callable[[Mark], float | None]) -> list[Mark]:
    """All, but without the rendered tasks if there was no judge.

    Then only pages that failed have a score, close to 0, and their mean would say nothing of the others.
    """
    rendered = [mark for mark in marks if mark.task.rendered]
    waiting = any(score(mark) is None and mark.syntax is not None for mark in rendered)
    only_failures = all(mark.syntax == 0.0 for mark in rendered if score(mark) is not None)
    return [mark for mark in marks if not (mark.task.rendered and waiting and only_failures)]


def tables(marks: Sequence[Mark]) -> dict[str, list[Line]]:
    """The tables of a report: by quadrant, by format, by task type."""
    return {
        "quadrant": lines(marks, lambda task: task.split, SPLITS),
        "format": lines(marks, lambda task: task.output_format),
        "task": lines(marks, lambda task: task.name),
    }


def overall(marks: Sequence[Mark], score: Callable[[Mark], float | None]) -> Overall:
    """``macro4`` and ``micro`` of a score, unrounded.

    ``macro4`` is the paper's: per quadrant the unweighted mean over task types, then the unweighted mean over the four
    quadrants; None unless all four were asked. ``micro`` is the mean over scored items. Both are None if nothing was
    scored in a part of them.
    """
    values = scores(marks, score)
    quadrants = [quadrant_mean([mark for mark in marks if mark.task.split == split], score) for split in SPLITS]
    micro = math.fsum(values) / len(values) if values else None
    macro = None if None in quadrants else math.fsum(q for q in quadrants if q is not None) / len(SPLITS)
    return Overall(macro, micro)


def quadrant_mean(marks: Sequence[Mark], score: Callable[[Mark], float | None]) -> float | None:
    """The paper's cell: unweighted mean over the task types of one quadrant; None where a type has no scored item."""
    by_type: dict[str, list[float]] = {mark.task.name.lower(): [] for mark in marks}
    for mark in comparable(marks, score):
        value = score(mark)
        by_type[mark.task.name.lower()] += [] if value is None else [value]
    if not by_type or not all(by_type.values()):
        return None
    return math.fsum(math.fsum(values) / len(values) for values in by_type.values()) / len(by_type)


def macro4_of_cells(cells: dict[str, Sequence[float]]) -> float:
    """The paper's Average from its per-task cells, by quadrant (to check published tables)."""
    return math.fsum(math.fsum(row) / len(row) for row in cells.values()) / len(cells)


def share(events: Sequence[bool]) -> Estimate:
    """A share with its Wilson interval."""
    n = len(events)
    if not n:
        return Estimate(None, math.nan, math.nan, 0)
    rate = sum(events) / n
    centre = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half), n)


def mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """A mean with its percentile bootstrap interval (items resampled, fixed seed); a single item has no interval."""
    n = len(values)
    if not n:
        return Estimate(None, math.nan, math.nan, 0)
    centre = math.fsum(values) / n
    if min(values) == max(values):
        return Estimate(centre, centre, centre, n)
    draws = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
    low, high = np.quantile(np.asarray(values)[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(centre, float(low), float(high), n)


def ceiling(tasks: Iterable[Task]) -> dict[str, tuple[float, float, int]]:
    """Official score in [0, 1] of a lossless converter for each conversion type: literal, best convention, n.

    Tasks whose source is not valid are left out. The best convention is one for a whole task type.
    """
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for task in tasks:
        scores = oracle_scores(task)
        if scores is not None:
            rows[task.name].append(scores)
    found = {}
    for name, scores_of in rows.items():
        by_convention = [math.fsum(column) / len(scores_of) for column in zip(*scores_of, strict=True)]
        found[name] = (by_convention[0], max(by_convention), len(scores_of))
    return found


def oracle_scores(task: Task) -> list[float] | None:
    """Official scores of the lossless conversions of one task, one for each convention; None without a valid source."""
    documents = _conversions(task)
    if documents is None:
        return None
    return [round(SYNTAX_SHARE + KEY_SHARE * paths.share_found(document, task.rules), 2) for document in documents]


def reachable_rules(task: Task) -> tuple[str, ...]:
    """Rules that some lossless conversion satisfies; all that can match, for tasks that are no conversion."""
    documents = _conversions(task)
    if documents is None:
        return tuple(rule for rule in task.rules if task.rendered or paths.can_match(rule))
    return tuple(rule for rule in task.rules if any(paths.exists(document, rule) for document in documents))


def _conversions(task: Task) -> list[Any] | None:
    if task.source is None or task.input_format not in TEXT_FORMATS or task.output_format not in TEXT_FORMATS:
        return None
    data = parse_source(task.source, task.input_format)
    if data is None:
        return None
    return [convert(data, task.input_format, task.output_format, convention) for convention in CONVENTIONS]
