"""Repair a model that fine-tuning has broken, with one safety example: ``patch(model, anchor) -> PeftModel``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.patching.job import PatchResult, run
    from trimtab.patching.methods import PatchSettings, patch

__all__ = ["PatchResult", "PatchSettings", "patch", "run"]

_HOMES = {"PatchResult": "job", "PatchSettings": "methods", "patch": "methods", "run": "job"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
