"""Key paths: the reference's little grammar for "this key exists in the parsed document".

Covered: plain keys, ``a.b``, ``a[0]``, ``a.*.b``, ``csv::header``, XML attributes (``@id``, which falls back to
``id``), back-ticks that quote dots; exactly as the reference reads them, with its odd ends.
Not covered: whether the value is right (``faithful.py``).

Existence only: null, ``{}`` and ``""`` exist. Keys that YAML reads as numbers or dates match no path. A list of one
element that XML gives as a plain value is not a list, so ``[0]`` fails on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CSV_PREFIX = "csv::"
HEADERS = "csv_headers"
ROWS = "csv_rows"


class PathSyntaxError(ValueError):
    """A path that the grammar cannot read: a ``[`` without its ``]``."""


@lru_cache(maxsize=65_536)
def tokens_of(path: str) -> tuple[str, ...]:
    """The tokens of a path.

    Raises:
        PathSyntaxError: an opening bracket outside back-ticks is never closed.
    """
    if path.startswith(CSV_PREFIX):
        return (path,)
    tokens: list[str] = []
    word = ""
    quoted = False
    position = 0
    while position < len(path):
        char = path[position]
        if char == "`":
            quoted = not quoted
        elif quoted or char not in ".[":
            word += char
        else:
            tokens += [word] if word else []
            word = ""
            if char == "[":
                end = path.find("]", position)
                if end < 0:
                    raise PathSyntaxError(f"'[' without ']' in {path!r}")
                tokens.append(path[position : end + 1])
                position = end
        position += 1
    return (*tokens, word) if word else tuple(tokens)


def exists(document: Any, path: str) -> bool:
    """Does the path lead anywhere in a parsed document? A path that cannot be read leads nowhere."""
    try:
        tokens = tokens_of(path)
    except PathSyntaxError:
        return False
    return walk(document, tokens)


def walk(node: Any, tokens: Sequence[str]) -> bool:
    """Follow tokens from a node; the order of the rules is the reference's."""
    if not tokens:
        return True
    first, rest = tokens[0], tokens[1:]
    if isinstance(node, dict) and HEADERS in node and first.startswith(CSV_PREFIX):
        return not rest and first.removeprefix(CSV_PREFIX) in (node[HEADERS] or ())
    if first == "*":
        return isinstance(node, list) and any(walk(item, rest) for item in node)
    if first.startswith("[") and first.endswith("]"):
        return _walk_index(node, first[1:-1], rest)
    if isinstance(node, dict):
        if first in node:
            return walk(node[first], rest)
        if first.startswith("@") and first[1:] in node:
            return walk(node[first[1:]], rest)
    return False


def _walk_index(node: Any, number: str, rest: Sequence[str]) -> bool:
    try:
        index = int(number)
    except ValueError:
        return False
    return isinstance(node, list) and 0 <= index < len(node) and walk(node[index], rest)


def missing(document: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths that lead nowhere, in order."""
    return tuple(path for path in paths if not exists(document, path))


def share_found(document: Any, paths: Sequence[str]) -> float:
    """Share of the paths that exist; 0.0 where there are none (as the reference has it)."""
    return sum(exists(document, path) for path in paths) / len(paths) if paths else 0.0


def can_match(path: str) -> bool:
    """Could any document satisfy the path? ``[*]`` and ``[-1]`` never can, nor can an unclosed bracket."""
    try:
        tokens = tokens_of(path)
    except PathSyntaxError:
        return False
    return all(_index_can_match(token) for token in tokens if token.startswith("[") and token.endswith("]"))


def _index_can_match(token: str) -> bool:
    try:
        return int(token[1:-1]) >= 0
    except ValueError:
        return False
