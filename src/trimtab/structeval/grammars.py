"""Grammars of the text formats for constrained decoding, in llguidance's Lark dialect; what they accept, parses.

Covered: JSON and Vega (any object or array that is not empty), YAML (block style to a depth of ``DEPTH``), TOML, XML,
CSV (to ``COLUMNS`` columns). Each accepts a subset of its format: enough to write any data, not every way to write it.
In YAML a plain scalar holds no colon, because llguidance's lexer does not go back.
Not covered, because no context-free grammar can say it: a TOML key or a CSV column given twice; XML names are therefore
a fixed list, the words of the task. Formats that are drawn: no grammar of theirs would promise a picture.

Pure text: no model, no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

DEPTH = 7  # levels of YAML
COLUMNS = 24
MOST_NAMES = 400  # XML names of one task
FALLBACK_NAMES = ("root", "item", "name", "value")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

_JSON = "start: %json " + json.dumps({
    "anyOf": [{"type": "object", "minProperties": 1}, {"type": "array", "minItems": 1}],
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},  # no endless space
}) + "\n"  # fmt: skip

_WORDS = r"[\p{L}_][\p{L}0-9_ .,\/()+@%!?'$;-]*"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"
_DATE = r"(?:19|20)[0-9]{2}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
_QUOTED = r'"(?:[^"\\\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]|\\["\\nt])*"'


def grammar(output_format: str, prompt: str) -> str:
    """The grammar for an answer in a format.

    Args:
        output_format: one of ``FORMATS``.
        prompt: the task's text; its words are the XML names.
    """
    return FORMATS[output_format](prompt)


def names_in(prompt: str) -> tuple[str, ...]:
    """Words of a text that can be XML names, each once, in order; a fallback where there is none."""
    found = dict.fromkeys(word.rstrip(".-") for word in _NAME.findall(prompt))
    usable = [word for word in found if not word.lower().startswith("xml")]
    return tuple(usable[:MOST_NAMES]) or FALLBACK_NAMES


def _yaml(_: str) -> str:
    lines = [
        "start: block0",
        f"KEY: /[\\p{{L}}_][\\p{{L}}0-9_-]*/ | /{_QUOTED}/",
        f'SCALAR: /{_WORDS}/ | /{_NUMBER}(?: {_WORDS})?/ | /{_DATE}/ | /{_QUOTED}/ | "[]" | "{{}}"',
        'NL: "\\n"',
    ]
    for depth in range(DEPTH):
        indent = f'"{"  " * depth}" ' if depth else ""
        deeper = f" | NL block{depth + 1}" if depth + 1 < DEPTH else ""
        lines += [
            f"block{depth}: pair{depth}+ | item{depth}+",
            f'pair{depth}: {indent}KEY ":" value{depth}',
            f'value{depth}: " " SCALAR NL{deeper}',
            f'item{depth}: {indent}"- " SCALAR NL',
        ]
        if depth + 1 < DEPTH:  # a mapping that begins behind its dash
            lines[-1] += f' | {indent}"- " KEY ":" value{depth + 1} pair{depth + 1}*'
    return "\n".join(lines) + "\n"


def _toml(_: str) -> str:
    return rf"""start: (NL | entry NL)* entry (NL+)?
entry: pair | table
pair: key " = " value
table: "[" key "]" | "[[" key "]]"
key: KEY ("." KEY)*
value: STRING | NUMBER | DATE | "true" | "false" | array | inline
array: "[" (value (", " value)*)? "]"
inline: "{{" KEY " = " value (", " KEY " = " value)* "}}"
KEY: /[A-Za-z_][A-Za-z0-9_-]*/
STRING: /{_QUOTED}/
NUMBER: /{_NUMBER}/
DATE: /{_DATE}/
NL: "\n"
"""


def _csv(_: str) -> str:
    lines = [
        f"start: {' | '.join(f'table{n}' for n in range(1, COLUMNS + 1))}",
        "table1: FULL (NL FULL)+ NL?",
        'FULL: /[^",\\r\\n\\s\\x00][^",\\r\\n\\x00]*/ | /"(?:[^"\\x00\\s]|"")(?:[^"\\x00]|"")*"/',
        'CELL: /[^",\\r\\n\\x00]*/ | /"(?:[^"\\x00]|"")*"/',
        'NL: "\\n"',
    ]
    for count in range(2, COLUMNS + 1):
        more = count - 1
        lines.append(f'table{count}: FULL ("," FULL){{{more}}} (NL row{count})+ NL?')
        lines.append(f'row{count}: CELL ("," CELL){{{more}}}')
    return "\n".join(lines) + "\n"


def _xml(prompt: str) -> str:
    names = names_in(prompt)
    lines = [
        'start: ("<?xml version=\\"1.0\\" encoding=\\"UTF-8\\"?>" NL)? element NL?',
        f"element: {' | '.join(f'e{n}' for n in range(len(names)))}",
        "content: (TEXT | ENTITY | element)*",
        'attribute: " " NAME "=" VALUE',
        f"NAME: {' | '.join(json.dumps(name) for name in names)}",
        r'VALUE: /"[^<&"\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]*"/',
        r"TEXT: /[^<&>\]\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]+/",
        "ENTITY: /&(?:amp|lt|gt|quot|apos);/",
        'NL: "\\n"',
    ]
    lines += [f'e{n}: "<{name}" attribute? (">" content "</{name}>" | "/>")' for n, name in enumerate(names)]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[str], str]] = {
    "json": lambda _: _JSON,
    "vega": lambda _: _JSON,
    "yaml": _yaml,
    "toml": _toml,
    "xml": _xml,
    "csv": _csv,
}


def unconstrained(formats: Sequence[str]) -> list[str]:
    """Those that have no grammar here."""
    return sorted(set(formats) - set(FORMATS))
