"""Strict, safe syntax checks for JSON, YAML, TOML, XML and CSV.

Covered: JSON by its standard (no NaN), YAML that is a mapping or a list, TOML 1.0, well-formed XML without entities,
CSV with a header and rows of one width; limits on size, nesting and alias expansion.
Not covered: schemas, duplicate JSON keys (the last one counts, as in Python).

An empty document (``{}``, ``[]``, nothing) is no answer: no format gives points for it.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.parsers.expat import ExpatError

import xmltodict
import yaml

from trimtab.structeval.paths import HEADERS, ROWS
from trimtab.structeval.textual import yaml_nodes

MAX_CHARS = 5_000_000


class Checked(NamedTuple):
    """``ok`` None: it could not be checked. ``error``: one line where it is not ok. ``value``: the parsed document."""

    ok: bool | None
    error: str | None
    value: object | None


def check_json(text: str) -> Checked:
    """A JSON object or array; NaN and Infinity are not JSON."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return _container(text, lambda: json.loads(text, parse_constant=refuse), (ValueError, RecursionError))


def check_yaml(text: str) -> Checked:
    """One YAML document that is a mapping or a list; prose, which YAML reads as a string, is not one."""
    errors = (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError)
    return _container(text, lambda: yaml_nodes.load(text, yaml.CSafeLoader), errors)


def check_toml(text: str) -> Checked:
    """TOML 1.0."""
    return _container(text, lambda: tomllib.loads(text), (ValueError, RecursionError))


def check_xml(text: str) -> Checked:
    """Well-formed XML as a dictionary (xmltodict's shape); entity declarations are refused."""
    return _container(text, lambda: xmltodict.parse(text), (ExpatError, ValueError, RecursionError))


def check_csv(text: str) -> Checked:
    """A header of distinct, non-empty names, at least one row, and every row as wide as the header."""
    if (refused := _too_large(text)) is not None:
        return refused
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        return Checked(False, f"CSV: {error}", None)
    problem = _table_problem(lines)
    if problem is not None:
        return Checked(False, problem, None)
    header, rows = lines[0], lines[1:]
    return Checked(True, None, {HEADERS: header, ROWS: [dict(zip(header, row, strict=True)) for row in rows]})


def _table_problem(lines: list[list[str]]) -> str | None:
    if len(lines) < 2:
        return "CSV: no header with a row below it"
    header = lines[0]
    if any(not name.strip() for name in header):
        return "CSV: a column without a name"
    if len(set(header)) < len(header):
        return "CSV: two columns with one name"
    for number, row in enumerate(lines[1:], 2):
        if len(row) != len(header):
            return f"CSV: row {number} has {len(row)} cells, the header {len(header)}"
    return None


def _container(text: str, load: Callable[[], Any], errors: tuple[type[BaseException], ...]) -> Checked:
    if (refused := _too_large(text)) is not None:
        return refused
    try:
        value = load()
    except errors as error:
        return Checked(False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", None)
    if not isinstance(value, (dict, list)):
        return Checked(False, f"a lone {type(value).__name__} is no document", None)
    return Checked(True, None, value) if value else Checked(False, "the document is empty", None)


def _too_large(text: str) -> Checked | None:
    if len(text) <= MAX_CHARS:
        return None
    return Checked(False, f"{len(text)} characters, the limit is {MAX_CHARS}", None)


CHECKS: dict[str, Callable[[str], Checked]] = {
    "json": check_json,
    "yaml": check_yaml,
    "toml": check_toml,
    "xml": check_xml,
    "csv": check_csv,
}
