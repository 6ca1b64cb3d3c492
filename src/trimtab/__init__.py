"""trimtab: keep a language model safe while you change it.

The names below are loaded on first use, so that ``import trimtab`` costs nothing and the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.anchors import Anchor, SafetyAnchors
    from trimtab.approximation.apply import approximate
    from trimtab.comparison import Policy, compare
    from trimtab.errors import TrimtabError
    from trimtab.evaluation.runner import AxisSpec, evaluate
    from trimtab.models import LoadedModel, load
    from trimtab.patching.methods import patch
    from trimtab.tuning.callback import SafetyGuardCallback
    from trimtab.tuning.guard import SafetyGuard

__version__ = "0.1.0"

_HOMES = {
    "Anchor": "anchors",
    "SafetyAnchors": "anchors",
    "approximate": "approximation.apply",
    "Policy": "comparison",
    "compare": "comparison",
    "TrimtabError": "errors",
    "AxisSpec": "evaluation.runner",
    "evaluate": "evaluation.runner",
    "LoadedModel": "models",
    "load": "models",
    "patch": "patching.methods",
    "SafetyGuardCallback": "tuning.callback",
    "SafetyGuard": "tuning.guard",
}

__all__ = [
    "Anchor",
    "AxisSpec",
    "LoadedModel",
    "Policy",
    "SafetyAnchors",
    "SafetyGuard",
    "SafetyGuardCallback",
    "TrimtabError",
    "__version__",
    "approximate",
    "compare",
    "evaluate",
    "load",
    "patch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
