"""One document, checked and drawn: what ``trimtab structeval render`` prints.

Covered: all 18 formats; a file or the text itself. Not covered: scoring.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.errors import DataError, UsageError
from trimtab.structeval import tasks
from trimtab.structeval.textual import CHECKS

_SUFFIXES = frozenset(
    [
        "html",
        "htm",
        "js",
        "jsx",
        "ts",
        "vue",
        "svg",
        "tex",
        "md",
        "py",
        "mmd",
        "typ",
        "json",
        "yaml",
        "yml",
        "toml",
        "xml",
        "csv",
    ]
)


Status = Literal["ok", "failed", "blank", "unavailable"]


class Shown(NamedTuple):
    """``status``: "ok", "failed", "blank", "unavailable"."""

    format: str
    status: Status
    errors: tuple[str, ...]
    text: str
    png: bytes | None

    def document(self, out: str | None) -> dict[str, Any]:
        """JSON-ready, without the picture's bytes."""
        return self._asdict() | {"png": out, "errors": list(self.errors)}


def show(file_or_text: str, format_name: str, *, unsandboxed_python: bool = False) -> Shown:
    """Check a document and draw it where its format renders; Python only in a sandbox, unless ``unsandboxed_python``.

    Raises:
        UsageError: unknown format. DataError: a file that cannot be read.
    """
    name = tasks.format_name(format_name)
    if name not in tasks.FORMATS:
        raise UsageError("unknown format", seen=format_name, fix=f"use one of: {', '.join(tasks.FORMATS)}")
    text = read(file_or_text)
    if name in CHECKS:
        checked = CHECKS[name](text)
        return Shown(name, "ok" if checked.ok else "failed", (checked.error,) if checked.error else (), text, None)
    try:
        render = importlib.import_module("trimtab.structeval.render")
    except ImportError as error:
        return Shown(name, "unavailable", (f"no renderer: {error}",), "", None)
    with render.Renderer(workers=1, unsandboxed_python=unsandboxed_python) as renderer:
        made = renderer.render(name, text)
    status: Status = "ok" if made.status == "rendered" else made.status
    return Shown(name, status, tuple(made.errors), made.text, made.png)


def read(file_or_text: str) -> str:
    """The content of a file if there is one of that name, else the text itself.

    Raises:
        DataError: a file that is no text; a name that looks like a file's, of which there is none.
    """
    short = len(file_or_text) < 1024 and "\n" not in file_or_text
    path = Path(file_or_text) if short and file_or_text and "\0" not in file_or_text else None
    if path is not None and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read that file", seen=path, fix=str(error)) from error
    if path is not None and " " not in file_or_text and path.suffix.lower().lstrip(".") in _SUFFIXES:
        raise DataError("no such file", seen=path, fix="check the path, or pass the text itself")
    return file_or_text
