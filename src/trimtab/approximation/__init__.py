"""Approximate activations: quantised, sparse, polynomial, noisy; put on a model by a string, taken off without a trace.

``with approximate(model, "bolt+a8"): model.generate(...)``. The names below are loaded on first use.

Covered: what changes inside a model (``apply.py`` and one module for each family). Not covered: what that does to
safety and utility (``trimtab.vetting``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.approximation.apply import active_label, approximate
    from trimtab.approximation.naming import parse
    from trimtab.approximation.sites import find_sites

__all__ = ["active_label", "approximate", "find_sites", "parse"]

_HOMES = {"active_label": "apply", "approximate": "apply", "find_sites": "sites", "parse": "naming"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
