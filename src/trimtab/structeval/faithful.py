"""Is the converted document the same data? Values, types and order, where the official score asks for keys alone.

Covered: conversions between JSON, YAML, TOML, XML and CSV. Between formats with types the documents must agree in
structure, names, types and order. As soon as XML or CSV takes part, what they cannot express does not count: wrapper
elements, attributes against children, lists of one, empty values, numbers and dates as text, lists in a cell.
Not covered: generation tasks (they have no source), rendered formats.

``score`` is the share of facts that agree among all facts of both documents; 1.0 exactly where nothing is lost, changed
or invented. Saying a thing twice (a nested object as a cell and as columns of its own) is not inventing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.structeval.converter import decoded_cell, parse_source, unflattened
from trimtab.structeval.facts import Fact, TooManyFactsError, text_facts, typed_facts
from trimtab.structeval.paths import ROWS
from trimtab.structeval.tasks import Task

TYPED = ("json", "yaml", "toml")
_SHOWN = 12
_NO_SOURCE_NAMES = ("root", "item", "row", "rows", "record", "records", "data", "items", "element")


class Faithful(NamedTuple):
    """``score`` None: the source is not valid or there is none. ``lost`` and ``invented``: the first few, in words."""

    score: float | None
    facts: int
    lost: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()
    note: str = ""


def compare(task: Task, document: Any) -> Faithful:
    """Compare a converted document with the source in the task.

    Args:
        task: a conversion between text formats.
        document: the parsed answer (as ``score.Corrected.document``); None where it did not parse, which scores 0.
    """
    if task.split != "t-conv" or task.source is None:
        return Faithful(None, 0, note="no conversion between text formats")
    source = parse_source(task.source, task.input_format)
    if source is None:
        return Faithful(None, 0, note=f"the source is not valid {task.input_format.upper()}")
    if document is None:
        return Faithful(0.0, 0, note="the answer is not valid")
    try:
        before, after = _both(source, task.input_format, document, task.output_format)
    except (TooManyFactsError, RecursionError) as error:
        return Faithful(None, 0, note=f"too large to compare: {error}")
    return _matched(before, after, exact=_is_typed(task.input_format, task.output_format))


def _both(source: Any, input_format: str, document: Any, output_format: str) -> tuple[list[Fact], list[Fact]]:
    if _is_typed(input_format, output_format):
        no_dates = output_format == "json"  # JSON writes a date as text
        return typed_facts(source, dates_are_text=no_dates), typed_facts(document, dates_are_text=no_dates)
    xml = "xml" in (input_format, output_format)
    if input_format == "csv":
        source = [_record(record) for record in source]
    if output_format == "csv":
        document = [_record(record) for record in document[ROWS]]
    return text_facts(source, xml=xml), text_facts(document, xml=xml)


def _record(row: dict[str, Any]) -> Any:
    return unflattened({key: decoded_cell(cell) for key, cell in row.items()})


def _is_typed(input_format: str, output_format: str) -> bool:
    return input_format in TYPED and output_format in TYPED


def _matched(before: Sequence[Fact], after: Sequence[Fact], *, exact: bool) -> Faithful:
    """Pair facts with equal value and place whose names agree; what is left over is lost or invented."""
    by_value: dict[Any, list[int]] = defaultdict(list)
    for index, fact in enumerate(after):
        by_value[fact.value, fact.places].append(index)
    used: set[int] = set()
    explained: set[int] = set()
    lost: list[Fact] = []
    for fact in before:
        fitting = [i for i in by_value[fact.value, fact.places] if _agree(fact.names, after[i].names, exact)]
        explained.update(fitting)
        free = [index for index in fitting if index not in used]
        if not free:
            lost.append(fact)
            continue
        used.add(min(free, key=lambda index: after[index].names != fact.names))
    invented = [fact for index, fact in enumerate(after) if index not in explained]
    kept = len(before) - len(lost)
    total = len(before) + len(invented)
    shown = tuple(fact.line() for fact in lost[:_SHOWN]), tuple(fact.line() for fact in invented[:_SHOWN])
    return Faithful(kept / total if total else 1.0, len(before), *shown)


def _agree(before: tuple[str, ...], after: tuple[str, ...], exact: bool) -> bool:
    """Equal names; or, where wrappers are a matter of taste, one is the other with names left out."""
    if before == after:
        return True
    if exact:
        return False
    short, long = sorted((before, after), key=len)
    if not short:
        return not [name for name in long if name.lower() not in _NO_SOURCE_NAMES][1:]
    core = [name for name in short if name.lower() not in _NO_SOURCE_NAMES] or list(short)
    remaining = iter(long)
    return all(name in remaining for name in core)
