"""What every renderable format has: a name, a syntax check that runs nothing, and a plan for its renderer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.structeval.formats.jobs import Job

MAX_SOURCE = 1_000_000  # characters


class Checked(NamedTuple):
    """``ok`` None: only rendering can tell. ``value``: what the parser made of the text, where there is a parser."""

    ok: bool | None
    error: str | None
    value: object | None


UNDECIDED = Checked(None, None, None)


def bad(error: str) -> Checked:
    """Certainly not of the format."""
    return Checked(False, error, None)


@dataclass(frozen=True)
class Format:
    """``examine`` and ``plan`` are pure and get text that is neither empty nor too long."""

    name: str
    examine: Callable[[str], Checked]
    plan: Callable[[str], Job]
    needs: tuple[str, ...]

    def check(self, text: str) -> Checked:
        """The syntax, as far as it can be told without running anything."""
        if not text.strip():
            return bad("empty")
        if len(text) > MAX_SOURCE:
            return bad(f"{len(text):,} characters; at most {MAX_SOURCE:,} are read")
        if "\0" in text:
            return bad("a NUL character")
        return self.examine(text)
