"""Comparisons as JUnit XML: one suite for each candidate, one case for each axis.

Covered: what CI systems show. A regression is a failure, an unmeasured axis an error, missing evidence a failure of
another type, since the gate does not let it pass either. Not covered: prompts and answers, which never enter a CI log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from trimtab.comparison.results import AxisResult, Comparison
from trimtab.reports import wording
from trimtab.reports.document import check_comparisons
from trimtab.reports.text import clip, visible

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(comparisons: Sequence[Comparison]) -> str:
    """A JUnit document.

    Raises:
        UsageError: for no comparison, or comparisons with different bases.
    """
    many = check_comparisons(comparisons)
    root = ET.Element("testsuites", name="trimtab")
    for one in many:
        failures = sum(axis.verdict in ("regression", "not enough evidence") for axis in one.axes)
        errors = sum(axis.verdict == "unmeasured" for axis in one.axes)
        suite = ET.SubElement(
            root,
            "testsuite",
            name=_text(one.candidate.model),
            tests=str(len(one.axes)),
            failures=str(failures),
            errors=str(errors),
            skipped="0",
            timestamp=_text(one.candidate.created),
        )
        properties = ET.SubElement(suite, "properties")
        for key, value in (("base", one.base.model), ("alpha", one.policy.alpha), ("power", one.policy.power)):
            ET.SubElement(properties, "property", name=key, value=_text(str(value)))
        for finding in one.findings:
            ET.SubElement(properties, "property", name=f"finding:{_text(finding.key)}", value=_text(finding.message))
        for axis in one.axes:
            _case(suite, one, axis)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, one: Comparison, axis: AxisResult) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=f"trimtab.{_text(axis.name)}", name=_text(axis.label or axis.name)
    )
    summary = _text(wording.change_sentence(axis, one.policy.alpha))
    reason = _text(wording.reason_sentence(axis, one.policy.power))
    if axis.verdict == "pass":
        ET.SubElement(case, "system-out").text = f"{summary}\n{reason}"
        return
    kind = "error" if axis.verdict == "unmeasured" else "failure"
    ET.SubElement(case, kind, type=axis.verdict.replace(" ", "-"), message=summary).text = reason


def _text(text: str) -> str:
    """One line that XML can carry and a reader can see."""
    return _NOT_XML.sub("?", clip(" ".join(visible(text).split()), 2000))
