"""Reads ``cases/*.cases``: a line ``=== valid: name`` or ``=== invalid: name``, then the text of the case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "cases"
HEAD = re.compile(r"^=== (valid|invalid): (.+)$", re.MULTILINE)


class Case(NamedTuple):
    """``valid``: it must be rendered; otherwise it must fail or stay blank."""

    format: str
    valid: bool
    name: str
    text: str


def load(format_name: str) -> list[Case]:
    """All cases of one format, in the order of the file."""
    pieces = HEAD.split((FOLDER / f"{format_name.lower()}.cases").read_text(encoding="utf-8"))
    return [
        Case(format_name, kind == "valid", name, text.removeprefix("\n").removesuffix("\n"))
        for kind, name, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
    ]
