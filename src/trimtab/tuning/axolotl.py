"""The guard as a plugin of axolotl: ``plugins: [trimtab.tuning.axolotl.TrimtabPlugin]`` and ``trimtab_guard: keel``.

Covered: axolotl's hook for callbacks that need the trainer (``add_callbacks_post_trainer``), the options as flat keys
of its configuration. Not covered: running axolotl itself; it is not installed where this is tested, the test calls the
hook as its documentation states it. The guard refuses what it cannot hook (FSDP 1) under axolotl too.

Keys: ``trimtab_guard`` (keel), ``trimtab_anchors`` (as --guard_anchors), ``trimtab_options`` (a mapping, e.g. rows: 3).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from trimtab.errors import UsageError
from trimtab.tuning.callback import SafetyGuardCallback
from trimtab.tuning.options import NO_GUARD, RULE_OPTIONS, named_anchors
from trimtab.tuning.rivals.recipes import RECIPES


def _base() -> Any:
    """axolotl's base class; a plain object where it is not installed, so that this module can be read and tested."""
    if importlib.util.find_spec("axolotl") is None:
        return object
    return importlib.import_module("axolotl.integrations.base").BasePlugin


class TrimtabPlugin(_base()):  # type: ignore[misc]
    """Adds the guard's callback to axolotl's trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that this plugin reads."""
        return "trimtab.tuning.axolotl.TrimtabArguments"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The guard's callback, or none for ``trimtab_guard: none``.

        Raises:
            UsageError: for an unknown guard, or one that is no rule of the optimizer step.
        """
        del trainer
        name = cfg.get("trimtab_guard") or "keel"
        if name == NO_GUARD:
            return []
        if name not in RULE_OPTIONS or name in RECIPES:
            known = ", ".join(rule for rule in RULE_OPTIONS if rule not in RECIPES)
            raise UsageError("unknown guard for axolotl", seen=name, fix=f"use one of: {known}")
        options = dict(cfg.get("trimtab_options") or {})
        return [SafetyGuardCallback(named_anchors(cfg.get("trimtab_anchors")), name, **options)]


def _arguments() -> Any:
    from pydantic import create_model

    return create_model(
        "TrimtabArguments",
        trimtab_guard=(str | None, None),
        trimtab_anchors=(str | None, None),
        trimtab_options=(dict[str, Any] | None, None),
    )


TrimtabArguments = _arguments()
