"""What differs between two settings: the keys of two JSON documents, the lines of two texts.

Covered: generation configs and decoding settings (nested keys, dotted), chat templates (added, removed and changed
lines; a template on one long line is read tag by tag). Not covered: whether a difference matters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

MOST_LINES = 2000  # of a text; what lies behind is not compared line by line (the hash still says that it differs)
_LONG_LINE = 160  # characters; templates are often stored as one line
_TAG_END = re.compile(r"(?<=%\})|(?<=\}\})")


class Difference(NamedTuple):
    """One key or one line that is not the same on both sides.

    Attributes:
        kind: "key" of a JSON document, or "line" of a text.
        place: the dotted key, or "line 4" (of the base; of an added line that of the candidate).
        base, candidate: the value as JSON, or the line; None where that side has none.
    """

    kind: Literal["key", "line"]
    place: str
    base: str | None
    candidate: str | None


def differences(base: str, candidate: str) -> tuple[Difference, ...]:
    """Keys where both are JSON objects, lines otherwise; empty where nothing readable differs."""
    ours, theirs = _object(base), _object(candidate)
    if ours is not None and theirs is not None:
        return key_differences(ours, theirs)
    return line_differences(base, candidate)


def key_differences(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Leaves that differ, sorted by key; a list is one leaf."""
    ours, theirs = dict(_leaves(base)), dict(_leaves(candidate))
    return tuple(
        Difference("key", key, ours.get(key), theirs.get(key))
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    )


def line_differences(base: str, candidate: str) -> tuple[Difference, ...]:
    """Lines that were changed, taken out or put in, in order."""
    ours, theirs = _lines(base), _lines(candidate)
    matcher = SequenceMatcher(None, [text for _, text in ours], [text for _, text in theirs], autojunk=False)
    found = []
    for what, start, end, other_start, other_end in matcher.get_opcodes():
        if what == "equal":
            continue
        for one, other in zip_longest(ours[start:end], theirs[other_start:other_end]):
            number = (one or other)[0]
            found.append(
                Difference("line", f"line {number}", one[1] if one else None, other[1] if other else None),
            )
    return tuple(found)


def places(found: tuple[Difference, ...], most: int = 6) -> str:
    """Where, for a sentence: "temperature and top_p", "line 1, line 4 and 7 more"."""
    names = list(dict.fromkeys(one.place for one in found))
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True, ensure_ascii=False)


def _lines(text: str) -> list[tuple[int, str]]:
    """Line numbers from 1, with the pieces of overlong lines, at most ``MOST_LINES``."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        pieces = _TAG_END.split(line) if len(line) > _LONG_LINE else [line]
        found += [(number, piece) for piece in pieces if piece or len(pieces) == 1]
        if len(found) >= MOST_LINES:
            break
    return found[:MOST_LINES]
