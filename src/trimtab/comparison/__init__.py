"""Numbers in, verdict out: paired statistics, power planning, policy and gate.

``compare(base, candidate, policy)`` is the one call that most code needs. The names below are loaded on first use, so
that reading records does not pull in SciPy and statsmodels.

Covered: binary and continuous axes, paired on item ids. Not covered: reading logs (``trimtab.evaluation``), reports
(``trimtab.reports``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.comparison.records import Axis, Item, Kind, Run

if TYPE_CHECKING:
    from trimtab.comparison.gate import compare
    from trimtab.comparison.policy import Policy, load_policy, policy_from_mapping
    from trimtab.comparison.power import minimum_detectable_difference, required_pairs
    from trimtab.comparison.results import EXIT_CODES, AxisResult, Comparison, Estimate, Finding, Verdict, worst

__all__ = [
    "EXIT_CODES",
    "Axis",
    "AxisResult",
    "Comparison",
    "Estimate",
    "Finding",
    "Item",
    "Kind",
    "Policy",
    "Run",
    "Verdict",
    "compare",
    "load_policy",
    "minimum_detectable_difference",
    "policy_from_mapping",
    "required_pairs",
    "worst",
]

_HOMES = {
    "compare": "gate",
    "Policy": "policy",
    "load_policy": "policy",
    "policy_from_mapping": "policy",
    "minimum_detectable_difference": "power",
    "required_pairs": "power",
    "EXIT_CODES": "results",
    "AxisResult": "results",
    "Comparison": "results",
    "Estimate": "results",
    "Finding": "results",
    "Verdict": "results",
    "worst": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
