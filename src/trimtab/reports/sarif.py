"""Comparisons as SARIF 2.1.0, for code-scanning views: one result for each axis that does not pass.

Covered: verdicts and findings as results with stable fingerprints. Not covered: prompts and answers, which never leave
the machine this way; source lines (a model has none, so a result points at the policy or the run folder).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from trimtab.comparison.results import AxisResult, Comparison, Verdict
from trimtab.reports import wording
from trimtab.reports.document import check_comparisons
from trimtab.reports.text import clip, visible

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: dict[Verdict, str] = {"regression": "error", "unmeasured": "error", "not enough evidence": "warning"}
_RULES = {
    "regression": "The candidate is worse than the reference by more than the margin.",
    "unmeasured": "An axis of the reference was not measured on the candidate.",
    "not-enough-evidence": "The data do not show that the candidate stays within the margin.",
    "finding": "Something beside the weights differs between the two runs.",
}


def to_sarif(comparisons: Sequence[Comparison], *, location: str = "trimtab-policy.yaml") -> str:
    """A SARIF document.

    Args:
        location: path, relative to the repository, that the results are shown at.

    Raises:
        UsageError: for no comparison, or comparisons with different bases.
    """
    from trimtab import __version__

    many = check_comparisons(comparisons)
    results = [_axis(one, axis, location) for one in many for axis in one.axes if axis.verdict != "pass"]
    results += [
        _result("finding", "note", f"{_line(one.candidate.model)}: {_line(finding.message)}", location)
        for one in many
        for finding in one.findings
        if finding.kind == "differs"
    ]
    rules = [{"id": key, "shortDescription": {"text": text}} for key, text in _RULES.items()]
    driver = {"name": "trimtab", "version": __version__, "rules": rules}
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def _axis(one: Comparison, axis: AxisResult, location: str) -> dict[str, Any]:
    text = (
        f"{_line(one.candidate.model)}: {wording.axis_label(axis)}: "
        f"{wording.change_sentence(axis, one.policy.alpha)} {wording.reason_sentence(axis, one.policy.power)}"
    )
    return _result(axis.verdict.replace(" ", "-"), _LEVELS[axis.verdict], text, location, axis.name)


def _result(rule: str, level: str, text: str, location: str, key: str = "") -> dict[str, Any]:
    print_ = hashlib.sha256(f"{rule}/{key or text}".encode("utf-8", "replace")).hexdigest()[:32]
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": text.encode("utf-8", "replace").decode()},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": location}}}],
        "partialFingerprints": {"trimtab/v1": print_},
    }


def _line(text: str) -> str:
    return clip(" ".join(visible(text).split()), 300)
