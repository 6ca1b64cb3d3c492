"""Names of the rivals, by kind, and the options that each knows on the command line."""

from __future__ import annotations

from typing import Any

from trimtab.tuning.rivals.asft import AsftRule
from trimtab.tuning.rivals.projecting import AGemRule, PcgradRule, PerTensorRule, SafeGradRule
from trimtab.tuning.rivals.stepping import AlternatingRule, LisaRule, SpardRule

#: Act in the optimizer step; also names for ``SafetyGuard(rule=...)`` and ``SafetyGuardCallback(rule=...)``.
STEP_RULES: dict[str, Any] = {
    "per-tensor": PerTensorRule,
    "alternating": AlternatingRule,
    "a-gem": AGemRule,
    "pcgrad": PcgradRule,
    "safegrad": SafeGradRule,
    "spard": SpardRule,
    "lisa": LisaRule,
    "asft": AsftRule,
}

#: Options by name of the guard, without the prefix ``guard_``.
OPTIONS: dict[str, tuple[str, ...]] = {
    "per-tensor": ("rows", "clip_after"),
    "alternating": ("rows",),
    "a-gem": ("rows", "clip_after"),
    "pcgrad": ("rows", "clip_after"),
    "safegrad": ("rho", "rows", "clip_after"),
    "spard": ("rows",),
    "lisa": ("align_steps", "task_steps", "rho", "rows"),
    "asft": ("base", "weight", "clip_after"),
    "safeinstr": ("share",),
    "constrained": (),
    "salora": ("rank",),
    "safe-lora": ("base",),
    "resta": ("base",),
}
