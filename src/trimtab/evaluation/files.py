"""Rows of a data file that the user named.

Covered: CSV, TSV, JSON Lines, JSON, plain text (a prompt a line), a folder of those; errors that name file and line.
Not covered: what the columns mean (``datasets.py``), the hub.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt")
MAX_FIELD = 10_000_000  # characters in one CSV field; the standard library stops at 131,072


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, or of every data file in a folder (rows then carry its stem as ``_file``).

    A plain text file gives rows with one column, ``prompt``; blank lines are skipped.

    Raises:
        DataError: missing, unreadable, malformed (with the line), an unknown kind of file, or empty.
    """
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix in SUFFIXES and file.name.upper() != "ORIGIN.JSON"
        )
        rows = [{**row, "_file": file.stem} for file in files for row in _read_file(file)]
    else:
        rows = _read_file(path)
    if not rows:
        raise DataError("that data set is empty: nothing would be measured", seen=path, fix="name a file that has rows")
    return rows


def read_text(path: Path) -> str:
    """The whole file as text.

    Raises:
        DataError: missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no file at that path", seen=path, fix="check the path") from error
    except IsADirectoryError as error:
        raise DataError("that is a folder, a file was expected", seen=path, fix="name a file in it") from error
    except UnicodeDecodeError as error:
        seen = f"{path}, byte {error.start}"
        raise DataError("that file is not UTF-8 text", seen=seen, fix="convert it: iconv -t UTF-8") from error
    except OSError as error:
        raise DataError(
            "cannot read that file", seen=f"{path}: {error.strerror}", fix="check its permissions"
        ) from error


def _read_file(path: Path) -> list[Row]:
    text = read_text(path)
    if path.suffix in (".csv", ".tsv"):
        return _read_table(path, text, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".jsonl":
        return [_json_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".json":
        return _read_json(path, text)
    if path.suffix == ".txt":
        return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
    raise DataError("unknown kind of data file", seen=path.name, fix=f"use one of: {', '.join(SUFFIXES)}")


def _read_table(path: Path, text: str, delimiter: str) -> list[Row]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)  # not splitlines: it breaks at U+0085
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    "a row has more fields than the header",
                    seen=f"{path}, line {reader.line_num}",
                    fix="quote fields that hold the delimiter",
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(
            "malformed table",
            seen=f"{path}, line {reader.line_num}: {error}",
            fix="write it as CSV with quoted fields, or as JSON Lines",
        ) from error
    return rows


def _read_json(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            "malformed JSON",
            seen=f"{path}, line {error.lineno}: {error.msg}",
            fix="mend that line; one object a line belongs in a .jsonl file",
        ) from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        fix = "give a list of objects, or JSON Lines with the suffix .jsonl"
        raise DataError("that JSON file is not a list of objects", seen=path, fix=fix)
    return content


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        fix = "write one JSON object a line"
        raise DataError("malformed JSON Lines", seen=f"{path}, line {number}: {reason}", fix=fix) from error
    if not isinstance(row, dict):
        seen = f"{path}, line {number}: {type(row).__name__}"
        raise DataError("a line is not a JSON object", seen=seen, fix="write one JSON object a line")
    return row


def pick(row: Row, columns: Sequence[str]) -> Any:
    """The first of several columns that the row has with a value, else None."""
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)
