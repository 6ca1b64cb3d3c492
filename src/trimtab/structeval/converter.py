"""A converter that loses nothing, under several conventions: the oracle for conversion tasks.

Covered: any of JSON, YAML, TOML, XML, CSV to JSON, YAML, XML or CSV, as the parsed form that the reference's rules see
(``xmltodict``'s shape for XML, headers and rows for CSV) and as text.
Not covered: guessing what a task's author meant. The conventions are the few that keep all values: wrappers in XML
collapsed to lists or not, a single CSV row as an object or as a list of one, several rows as a list or the first row
as an object (the last loses rows and is marked so).
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
import tomllib
from dataclasses import dataclass
from typing import Any

import xmltodict
import yaml

from trimtab.structeval.paths import HEADERS, ROWS
from trimtab.structeval.textual import CHECKS, yaml_nodes

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_NOT_NAME = re.compile(r"[^\w.-]+")
MAX_INDEX = 10_000


@dataclass(frozen=True)
class Convention:
    """One way to map documents that keeps their values (``first_row`` does not: all rows but the first are lost)."""

    name: str
    collapse_wrappers: bool = False
    first_row: bool = False


LITERAL = Convention("literal")
COLLAPSED = Convention("wrappers collapsed", collapse_wrappers=True)
FIRST_ROW = Convention("first row as object", first_row=True)
CONVENTIONS = (LITERAL, COLLAPSED, FIRST_ROW)


def parse_source(text: str, input_format: str) -> Any:
    """The data of a source document, or None where it is not valid; CSV as a list of flat records."""
    if input_format == "yaml":
        return _or_none(lambda: yaml_nodes.load(text, yaml.CSafeLoader), (yaml.YAMLError, ValueError))
    if input_format == "toml":
        return _or_none(lambda: tomllib.loads(text), (ValueError,))
    checked = CHECKS[input_format](text.strip())
    if input_format == "csv" and not checked.ok:  # a ragged row in a source is still data
        reader = csv.DictReader(io.StringIO(text.strip()))
        return [{key: value for key, value in row.items() if key is not None} for row in reader]
    value: Any = checked.value
    return value[ROWS] if checked.ok and input_format == "csv" else value


def convert(data: Any, input_format: str, output_format: str, convention: Convention = LITERAL) -> Any:
    """Data of a source in the parsed form of the output format.

    JSON, YAML and TOML give their data; XML gives what ``xmltodict`` would parse; CSV gives headers and rows.
    """
    if input_format == "csv":
        records = [unflattened({key: decoded_cell(cell) for key, cell in record.items()}) for record in data]
        first_only = convention.first_row and output_format != "xml"
        data = records[0] if len(records) == 1 or (first_only and records) else records
    elif input_format == "xml" and convention.collapse_wrappers:
        data = collapsed(data)
    if output_format == "csv":
        return table(data)
    if output_format == "xml":
        return xmltodict.parse(to_xml(data))
    return data


def to_text(data: Any, output_format: str) -> str:
    """Converted data (before ``convert`` for XML and CSV) as a document."""
    if output_format == "json":
        return json.dumps(data, default=_plain, ensure_ascii=False)
    if output_format == "yaml":
        return str(yaml.safe_dump(data, allow_unicode=True, sort_keys=False))
    if output_format == "xml":
        return to_xml(data)
    if output_format == "csv":
        return to_csv(data)
    raise KeyError(output_format)


def decoded_cell(cell: Any) -> Any:
    """A cell that holds a JSON list or object as that; any other as it is."""
    if not isinstance(cell, str) or not cell.startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def unflattened(record: dict[str, Any]) -> Any:
    """``{"a.b[0].c": 1}`` as ``{"a": {"b": [{"c": 1}]}}``; keys that contradict each other stay flat."""
    root: dict[str, Any] = {}
    for key, value in record.items():
        steps = [name or int(index) for name, index in _STEP.findall(key)]
        if not steps or isinstance(steps[0], int) or not _place(root, steps, value):
            root[key] = value
    return root


def _place(root: Any, steps: list[str | int], value: Any) -> bool:
    node = root
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        fresh: Any = value if following is None else ([] if isinstance(following, int) else {})
        if isinstance(step, int):
            if not isinstance(node, list) or step > MAX_INDEX:
                return False
            node += [None] * (step + 1 - len(node))
            if following is None or node[step] is None:
                node[step] = fresh
        else:
            if not isinstance(node, dict):
                return False
            if following is None or node.get(step) is None:
                node[step] = fresh
        node = node[step]
    return True


def collapsed(node: Any) -> Any:
    """XML wrappers as lists: ``{"moons": {"moon": [a, b]}}`` becomes ``{"moons": [a, b]}``, a lone child a list of one.

    A wrapper is an element below the root whose only child's name is the singular of its own.
    """
    if not isinstance(node, dict):
        return node
    return {key: _inside(value) for key, value in node.items()}


def _inside(node: Any) -> Any:
    if isinstance(node, list):
        return [_inside(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _unwrapped(key, value) for key, value in node.items()}


def _unwrapped(name: str, value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((child, inner),) = value.items()
        if is_singular(child, name):
            return [_inside(item) for item in (inner if isinstance(inner, list) else [inner])]
    return _inside(value)


def is_singular(child: str, wrapper: str) -> bool:
    """Is ``child`` the singular of ``wrapper``, as far as plain English plurals go?"""
    one, many = child.lower(), wrapper.lower()
    forms = {one + "s", one + "es", one + "list", one + "_list"}
    if one.endswith("y"):
        forms.add(one[:-1] + "ies")
    if one.endswith("f"):
        forms.add(one[:-1] + "ves")
    return many in forms or (len(one) >= 3 and many.endswith(tuple(forms)))


def to_xml(data: Any) -> str:
    """XML: a list is a repeated element; a document without a single root gets one named ``root``."""
    tree = _named(data)
    one_root = isinstance(tree, dict) and len(tree) == 1 and not isinstance(next(iter(tree.values())), list)
    if not one_root:
        tree = {"root": tree if isinstance(tree, dict) else {"item": tree}}
    return str(xmltodict.unparse(tree, pretty=False))


def _named(node: Any) -> Any:
    """Names that XML allows, nested lists as items, values as text."""
    if isinstance(node, dict):
        return {_xml_name(str(key)): _named(value) for key, value in node.items()}
    if isinstance(node, list):
        return [{"item": _named(item)} if isinstance(item, list) else _named(item) for item in node]
    if isinstance(node, bool):
        return str(node).lower()
    return node if node is None else _plain_text(node)


def _xml_name(name: str) -> str:
    if name.startswith(("@", "#")):
        return name
    plain = _NOT_NAME.sub("_", name) or "_"
    return plain if plain[0].isalpha() or plain[0] == "_" else f"_{plain}"


def table(data: Any) -> dict[str, Any]:
    """Headers and rows: one row for each record, one column for each key, and flattened names beside them."""
    rows = []
    for record in records_of(data):
        row: dict[str, str] = {}
        _flatten("", record, row)
        rows.append(row)
    headers = list(dict.fromkeys(name for row in rows for name in row))
    return {HEADERS: headers, ROWS: [{name: row.get(name, "") for name in headers} for row in rows]}


def records_of(data: Any) -> list[Any]:
    """The records of a document: its outermost list of objects, or the document itself."""
    node = data
    while isinstance(node, dict) and len(node) == 1:
        node = next(iter(node.values()))
    if isinstance(node, list) and all(isinstance(item, dict) for item in node):
        return node
    return [data]


def _flatten(prefix: str, node: Any, row: dict[str, str]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, (dict, list)):
                row.setdefault(str(key), json.dumps(value, default=_plain))
            else:
                row.setdefault(str(key), _plain_text(value))
            name = f"{prefix}.{key}" if prefix else str(key)
            _flatten(name, value, row)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _flatten(f"{prefix}[{index}]", value, row)
    else:
        row.setdefault(prefix, _plain_text(node))


def to_csv(data: Any) -> str:
    """The table as text."""
    found = table(data)
    out = io.StringIO()
    writer = csv.DictWriter(out, found[HEADERS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found[ROWS])
    return out.getvalue()


def _plain_text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(_plain(value))


def _plain(value: Any) -> Any:
    dated = isinstance(value, (datetime.date, datetime.datetime, datetime.time))
    return value.isoformat() if dated else value


def _or_none(load: Any, errors: tuple[type[BaseException], ...]) -> Any:
    try:
        return load()
    except errors:
        return None
