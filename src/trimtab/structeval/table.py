"""Scores as a person reads them: one line a format or quadrant, each number with its interval and n.

Covered: text and Markdown. Not covered: HTML (``gallery.py``), numbers (``aggregate.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.structeval.aggregate import Estimate, Line, Mark, ceiling, overall, tables
from trimtab.structeval.run import Item

HEADS = ("", "n", "official", "corrected", "valid syntax", "keys", "faithful", "all values kept", "unscored")


def score_text(value: float | None) -> str:
    """``0.87``, or a dash where unscored."""
    return "-" if value is None else f"{value:.2f}"


def estimate_text(found: Estimate) -> str:
    """``42.9 [40.1, 45.8]`` in percent; a dash where nothing was scored."""
    if found.value is None:
        return "-"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def cells(line: Line) -> list[str]:
    """The row's texts, as ``HEADS``."""
    numbers = (line.official, line.corrected, line.syntax, line.keys, line.faithful, line.faithful_whole)
    return [line.name, str(line.items), *map(estimate_text, numbers), str(line.unscored)]


def markdown(items: Sequence[Item], *, by: Sequence[str] = ("quadrant", "format", "task")) -> str:
    """Tables and summary as Markdown."""
    marks = [item.mark for item in items]
    found = tables(marks)
    parts = [_markdown_table((name, *HEADS[1:]), [cells(line) for line in found[name]]) for name in by]
    return "\n\n".join([*parts, *summary(items)]) + "\n"


def summary(items: Sequence[Item]) -> list[str]:
    """The averages, how the two scores differ, what was rescued, the ceilings of conversions."""
    marks = [item.mark for item in items]
    lines = [_averages(marks)]
    kinds = Counter(
        reason.partition(":")[0].partition("(")[0].strip() for i in items for reason in i.scored.differences
    )
    lines += [f"- {count} items: {kind}" for kind, count in kinds.most_common()]
    if rescued := sum(item.scored.corrected.decoded for item in items):
        lines.append(f"- {rescued} items parse only after their escape sequences were decoded (counted as valid)")
    tops = ceiling([item.generated.task for item in items if item.generated.task.split == "t-conv"])
    lines += [
        f"- {name}: a lossless converter scores {100 * literal:.1f} literally, {100 * best:.1f} by the best convention "
        f"(n = {n})"
        for name, (literal, best, n) in tops.items()
    ]
    return ["\n".join(lines)]


def document(items: Sequence[Item]) -> dict[str, Any]:
    """The tables as JSON."""
    marks = [item.mark for item in items]
    return {
        "tables": {name: [_line_document(line) for line in lines] for name, lines in tables(marks).items()},
        "official": overall(marks, lambda mark: mark.official)._asdict(),
        "corrected": overall(marks, lambda mark: mark.corrected)._asdict(),
        "unscored": sum(mark.corrected is None for mark in marks),
        "decoded": sum(item.scored.corrected.decoded for item in items),
    }


def _line_document(line: Line) -> Mapping[str, Any]:
    return {key: _finite(value) if isinstance(value, Estimate) else value for key, value in line._asdict().items()}


def _finite(found: Estimate) -> dict[str, Any]:
    known = found.value is not None
    return {
        "value": found.value,
        "low": found.low if known else None,
        "high": found.high if known else None,
        "n": found.n,
    }


def _averages(marks: Sequence[Mark]) -> str:
    official, corrected = overall(marks, lambda mark: mark.official), overall(marks, lambda mark: mark.corrected)
    texts = []
    for name, found in (("official", official), ("corrected", corrected)):
        micro = "-" if found.micro is None else f"{100 * found.micro:.2f} ({found.micro!r} unrounded)"
        macro = "- (needs all four quadrants)" if found.macro4 is None else f"{100 * found.macro4:.2f}"
        texts.append(f"- {name}: micro {micro}, macro4 {macro}")
    return "\n".join(texts)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])
