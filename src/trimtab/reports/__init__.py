"""A verdict as people and machines read it: HTML, Markdown, JSON.

Each function takes a non-empty sequence of ``Comparison`` with one base. They are loaded on first use, so that the
command line starts fast.

Covered: one or several candidates side by side. Not covered: deciding anything; ``trimtab.comparison`` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.reports.document import SCHEMA, to_document, to_json
    from trimtab.reports.html import to_html
    from trimtab.reports.markdown import to_markdown

__all__ = ["SCHEMA", "to_document", "to_html", "to_json", "to_markdown"]

_HOMES = {
    "SCHEMA": "document",
    "to_document": "document",
    "to_json": "document",
    "to_html": "html",
    "to_markdown": "markdown",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
