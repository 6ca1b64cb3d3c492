"""A verdict as people and machines read it: HTML, Markdown, JSON, JUnit, SARIF, and what the model hub shows.

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
    from trimtab.reports.hub import model_card_block, with_block, write_eval_results
    from trimtab.reports.junit import to_junit
    from trimtab.reports.markdown import to_markdown
    from trimtab.reports.sarif import to_sarif

__all__ = [
    "SCHEMA",
    "model_card_block",
    "to_document",
    "to_html",
    "to_json",
    "to_junit",
    "to_markdown",
    "to_sarif",
    "with_block",
    "write_eval_results",
]

_HOMES = {
    "SCHEMA": "document",
    "to_document": "document",
    "to_json": "document",
    "to_html": "html",
    "to_junit": "junit",
    "to_markdown": "markdown",
    "to_sarif": "sarif",
    "model_card_block": "hub",
    "with_block": "hub",
    "write_eval_results": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
