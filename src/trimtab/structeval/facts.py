"""A document as facts: which value stands under which names, at which place of which list.

Covered: the two ways to look at a document: ``typed`` (JSON, YAML, TOML: types, exact names, every index) and ``text``
(as soon as XML or CSV is on one side: everything is text there, wrappers and attributes are matters of taste).
Not covered: comparing (``faithful.py``).
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from trimtab.structeval.converter import decoded_cell

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d.*)?")
_SEPARATOR = re.compile(r"\s*[;|]\s*")
_MARKS = "@$_-"
_TEXT_NAMES = ("#text", "$t", "_text")
_NOT_WORD = re.compile(r"[^\w.-]+")
MAX_FACTS = 50_000


class Fact(NamedTuple):
    """``names`` from the root down; ``places``: positions in the lists on the way; ``value``: comparable."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    value: Any

    def line(self) -> str:
        """``planets.name [1] = 'Zephyra'``, for a person."""
        where = ".".join(self.names) or "(top)"
        return where + "".join(f"[{place}]" for place in self.places) + f" = {str(self.value[1])[:80]!r}"


class TooManyFactsError(ValueError):
    """A document with more than ``MAX_FACTS`` values."""


def typed_facts(document: Any, *, dates_are_text: bool) -> list[Fact]:
    """Facts of a document in a format with types.

    Args:
        document: parsed JSON, YAML or TOML.
        dates_are_text: the target has no dates, so that text which is a date may stand for one.
    """
    return _bounded(_typed(document, (), (), dates_are_text))


def text_facts(document: Any, *, xml: bool) -> list[Fact]:
    """Facts of a document where one side is XML or CSV. Empty values are no facts; a list of values is one fact.

    Args:
        document: parsed in any format; CSV as a list of unflattened records.
        xml: names are compared as XML allows them.
    """
    return _bounded(_texts(_pruned(document), (), (), xml))


def typed_value(value: Any, *, dates_are_text: bool) -> tuple[str, Any]:
    """A scalar with its type: numbers by value (1 equals 1.0), dates by their instant."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, (int, float)):
        return "number", _decimal(value)
    if isinstance(value, (datetime.date, datetime.datetime, datetime.time)):
        return "date", _instant(value.isoformat())
    if value is None:
        return "null", None
    text = str(value)
    return ("date", _instant(text)) if dates_are_text and _DATE.fullmatch(text) else ("text", text)


def text_value(value: Any) -> tuple[str, Any]:
    """A scalar as text that formats without types would write alike: ``true`` and ``TRUE``, 1.0 and 1, dates."""
    if isinstance(value, bool):
        return "text", str(value).lower()
    if isinstance(value, (int, float)):
        return "number", _decimal(value)
    text = value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else str(value).strip()
    if text.lower() in ("true", "false"):
        return "text", text.lower()
    if len(text) <= 64 and _NUMBER.fullmatch(text):
        return "number", _decimal(text)
    return ("date", _instant(text)) if _DATE.fullmatch(text) else ("text", " ".join(text.split()))


def _typed(node: Any, names: tuple[str, ...], places: tuple[int, ...], dates: bool) -> Iterator[Fact]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _typed(value, (*names, _key(key)), places, dates)
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from _typed(value, names, (*places, index), dates)
    elif isinstance(node, (dict, list)):
        yield Fact(names, places, ("empty", type(node).__name__))
    else:
        yield Fact(names, places, typed_value(node, dates_are_text=dates))


def _texts(node: Any, names: tuple[str, ...], places: tuple[int, ...], xml: bool) -> Iterator[Fact]:
    if isinstance(node, dict):
        for key, value in node.items():
            inner = names if key in _TEXT_NAMES else (*names, _plain_name(_key(key), xml))
            yield from _texts(value, inner, places, xml)
    elif isinstance(node, list) and any(isinstance(item, (dict, list)) for item in node):
        for index, value in enumerate(node):
            yield from _texts(value, names, (*places, index) if len(node) > 1 else places, xml)
    elif isinstance(node, list):
        yield Fact(names, places, _joined([text_value(item) for item in node]))
    else:
        parts = _SEPARATOR.split(str(node).strip()) if isinstance(node, str) else [node]
        yield Fact(names, places, _joined([text_value(part) for part in parts if part != ""]))


def _joined(values: list[tuple[str, Any]]) -> tuple[str, Any]:
    return values[0] if len(values) == 1 else ("list", tuple(values))


def _pruned(node: Any) -> Any:
    """Without empty values, which XML and CSV cannot tell from absent ones; JSON in a cell read as data."""
    node = decoded_cell(node)
    if isinstance(node, dict):
        kept = {key: _pruned(value) for key, value in node.items() if not _is_namespace(key)}
        return {key: value for key, value in kept.items() if not _is_empty(value)}
    if isinstance(node, list):
        return [value for value in map(_pruned, node) if not _is_empty(value)]
    return node


def _is_namespace(key: Any) -> bool:
    return isinstance(key, str) and (key == "@xmlns" or key.startswith(("@xmlns:", "@xsi:")))


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, []) or (isinstance(value, str) and not value.strip(" ;|\t\n"))


def _key(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _plain_name(name: str, xml: bool) -> str:
    plain = name.strip().lstrip(_MARKS) or name
    return _NOT_WORD.sub("_", plain) if xml else plain


def _decimal(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return Decimal(str(value)).normalize()
    except InvalidOperation:
        return str(value)


def _instant(text: str) -> str:
    """One spelling for one moment: ``Z`` and ``+00:00``, a blank or a T; offsets as UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC)
    return moment.isoformat()


def _bounded(facts: Iterator[Fact]) -> list[Fact]:
    found: list[Fact] = []
    for fact in facts:
        if len(found) >= MAX_FACTS:
            raise TooManyFactsError(f"more than {MAX_FACTS} values")
        if fact.value != ("list", ()):
            found.append(fact)
    return found
