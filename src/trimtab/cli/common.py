"""What every verb shares: help with examples, ``--json``, printing, writing a file whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
RAN = "0 it ran"
VERDICTS = "0 pass", "3 regression", "4 an axis unmeasured", "5 not enough evidence"


def examples(*lines: str, codes: tuple[str, ...] = (RAN,)) -> str:
    """A help epilogue that click does not re-wrap.

    Args:
        codes: exit codes beside those that every verb has.
    """
    every = ", ".join(sorted([*codes, "1 usage", "2 could not run"]))
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) + f"\n\nExit codes: {every}."


def json_option(function: F) -> F:
    """``--json``: one document on standard output, everything else on standard error."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")(function)


def emit(document: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    click.echo(json.dumps(document, indent=1) if as_json else "\n".join(lines))


def write_text(path: Path, text: str) -> None:
    """Write beside and move, so that a reader or a full disk never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
