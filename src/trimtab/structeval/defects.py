"""Defects in the data set itself, reported instead of silently scored.

Covered: sources that are not valid, prompts with a literal ``\\n`` pair or without a closing tag, rules that no
document can satisfy, CSV rules on other formats and the reverse, doubtful path spellings, keywords too short to mean
anything, rules and ids that occur twice, text of a V question that a picture cannot show.
Not covered: whether an answer in the set is right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from trimtab.structeval import paths
from trimtab.structeval.converter import parse_source
from trimtab.structeval.tasks import TEXT_FORMATS, Task

_INVISIBLE = re.compile(
    r"\bclass(?:es)?\b|\bCSS\b|#[0-9a-f]{6}\b|\bid attribute\b|\bafter (?:click|submit)|\bhook\b|\bstate variable|"
    r"\balt text\b|\bmedia quer",
    re.IGNORECASE,
)


class Defect(NamedTuple):
    """``kind``: a fixed word. ``impossible``: no answer can satisfy the rule, so the official score is capped."""

    task_id: str
    kind: str
    seen: str
    impossible: bool = False


def find(tasks: Iterable[Task]) -> list[Defect]:
    """All defects, in the order of the tasks."""
    found: list[Defect] = []
    ids: set[str] = set()
    for task in tasks:
        if task.id in ids:
            found.append(Defect(task.id, "id twice", task.id))
        ids.add(task.id)
        found += _prompt_defects(task)
        found += _keyword_defects(task) if task.rendered else _path_defects(task)
    return found


def counted(defects: Iterable[Defect]) -> dict[str, int]:
    """How often each kind occurs, most frequent first."""
    return dict(Counter(defect.kind for defect in defects).most_common())


def impossible_rules(task: Task) -> tuple[str, ...]:
    """Rules of a task for a text format that no document of that format can satisfy."""
    return tuple(defect.seen for defect in _path_defects(task) if defect.impossible)


def _prompt_defects(task: Task) -> list[Defect]:
    found = []
    if "\\n\\n<code>" in task.query:
        found.append(Defect(task.id, "literal \\n in the prompt", "\\n\\n<code>"))
    if task.source is not None and "</code>" not in task.query:
        found.append(Defect(task.id, "no closing tag in the prompt", task.query[-40:]))
    checkable = task.source is not None and task.input_format in TEXT_FORMATS
    if checkable and parse_source(task.source or "", task.input_format) is None:
        seen = (task.source or "").strip()[:60]
        found.append(Defect(task.id, f"source is not valid {task.input_format.upper()}", seen))
    return found


def _path_defects(task: Task) -> list[Defect]:
    found = []
    for rule, times in Counter(task.rules).items():
        if times > 1:
            found.append(Defect(task.id, "rule twice", rule))
        is_csv = rule.startswith(paths.CSV_PREFIX)
        if not paths.can_match(rule):
            found.append(Defect(task.id, "rule can never match", rule, True))
        elif is_csv and task.output_format != "csv":
            found.append(Defect(task.id, "CSV rule on another format", rule))
        elif not is_csv and task.output_format == "csv":
            found.append(Defect(task.id, "CSV rule without csv::", rule))
        elif ".." in rule:
            found.append(Defect(task.id, "empty step in a path", rule))
    return found


def _keyword_defects(task: Task) -> list[Defect]:
    found = [Defect(task.id, "keyword of one character", rule) for rule in task.rules if len(rule.strip()) < 2]
    found += [Defect(task.id, "keyword twice", rule) for rule, times in Counter(task.rules).items() if times > 1]
    found += [Defect(task.id, "keyword typo", rule) for rule in task.rules if rule.startswith("put.")]
    for question in task.questions:
        if _INVISIBLE.search(question.question + " " + question.answer):
            found.append(Defect(task.id, "question about what a picture cannot show", question.question))
    return found
