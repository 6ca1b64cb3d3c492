"""The reference's parsers for the five text formats, and what it counts as success.

Covered: ``json``, PyYAML's pure SafeLoader, ``toml`` 0.10 (not TOML 1.0), ``xmltodict``, ``csv.DictReader``; a document
is good if it parses and is truthy; CSV is always good.
Not covered: better parsers (``strict.py``).

Differences that safety needs, all on hostile input only: YAML whose aliases expand beyond any honest size counts as not
parsed, and a document above ``MAX_CHARS`` is not looked at.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any, NamedTuple

import toml
import xmltodict
import yaml

from trimtab.structeval.paths import HEADERS, ROWS
from trimtab.structeval.textual import yaml_nodes

MAX_CHARS = 5_000_000
MAX_SLOW_YAML_CHARS = 500_000  # above it the C loader: the pure one takes seconds for each 100 KB


class Parsed(NamedTuple):
    """``good``: the reference's render_score is 1. ``keys_readable``: its second parse, for the keys, succeeds too."""

    good: bool
    document: Any
    keys_readable: bool
    error: str | None


class TooLargeError(ValueError):
    """A document above ``MAX_CHARS``: the reference would have tried."""


def parse(code: str, output_format: str) -> Parsed:
    """Parse as the reference does.

    The reference writes the document to a file as UTF-8 and reads it back as text: a lone surrogate is a failure, and
    every kind of line end becomes ``\\n``.

    Raises:
        TooLargeError: above ``MAX_CHARS``. KeyError: a format that is not one of the five.
    """
    if len(code) > MAX_CHARS:
        raise TooLargeError(f"{len(code)} characters, the limit is {MAX_CHARS}")
    loader = _LOADERS[output_format]
    try:
        code.encode("utf-8")
    except UnicodeEncodeError as error:
        return Parsed(False, None, False, f"lone surrogate: {error.reason}")
    text = code.replace("\r\n", "\n").replace("\r", "\n")
    try:
        document = loader(text)
    except Exception as error:  # noqa: BLE001 - the parsers raise whatever they like on bad input: all of it is "bad"
        good = output_format == "csv"  # the reference looks at the reader, not at what it reads
        return Parsed(good, None, False, f"{type(error).__name__}: {str(error)[:200]}")
    return Parsed(bool(document), document, True, None if document else "the document is empty")


def _csv(text: str) -> dict[str, Any]:
    reader = csv.DictReader(io.StringIO(text))
    return {HEADERS: list(reader.fieldnames or ()), ROWS: list(reader)}


def _yaml(text: str) -> Any:
    slow = len(text) <= MAX_SLOW_YAML_CHARS
    return yaml_nodes.load(text, yaml.SafeLoader if slow else yaml.CSafeLoader)


_LOADERS = {"json": json.loads, "yaml": _yaml, "toml": toml.loads, "xml": xmltodict.parse, "csv": _csv}
