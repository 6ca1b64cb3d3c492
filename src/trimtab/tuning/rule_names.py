"""Update rules by name.

Covered: every rule that changes a step, and its options. Not covered: methods that work after training
(``rivals/catalogue.py``), and reading options from a command line (``options.py``).
"""

from __future__ import annotations

from typing import Any

from trimtab.errors import UsageError
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.patient import PatientKeelRule
from trimtab.tuning.rivals.catalogue import STEP_RULES
from trimtab.tuning.rules import MixingRule, Rule, SpfRule

RULES: dict[str, Any] = {
    "spf": SpfRule,
    "keel": KeelRule,
    "keel-patient": PatientKeelRule,
    "mixing": MixingRule,
    **STEP_RULES,
}


def make_rule(name: str, **options: Any) -> Rule:
    """A rule by name with its options.

    Raises:
        UsageError: for an unknown name or option.
    """
    if name not in RULES:
        raise UsageError("unknown guard rule", seen=name, fix=f"use one of: {', '.join(RULES)}")
    known = set(RULES[name].__dataclass_fields__) - {"name"}
    if unknown := set(options) - known:
        raise UsageError(f"unknown option for the rule {name}", seen=sorted(unknown), fix=f"known: {sorted(known)}")
    rule: Rule = RULES[name](**options)
    return rule
