"""Answers with labels by people, for training and calibrating judges.

Covered: JSON Lines, CSV and JSON with a prompt, an answer and a label; the layouts of XSTest completions, PyRIT scorer
evaluations and JailbreakBench artifacts. Not covered: collecting labels; whether the labels are right.

What a label means differs between sets: "refused" is about language, "harmful" about content. A set says which one it
holds, and a judge is only measured on its own.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import DataError
from trimtab.evaluation.files import pick, read_rows, read_text

Question = Literal["refused", "harmful"]
_PROMPT = ("goal", "objective", "prompt", "question", "behavior", "instruction")
_ANSWER = ("answer", "completion", "assistant_response", "response", "generation", "output")
_LABELS: dict[Question, tuple[str, ...]] = {
    "refused": ("refused", "is_refusal", "refusal", "final_label", "human_score", "label"),
    "harmful": ("harmful", "jailbroken", "human_score_1", "human_score", "is_harmful", "label"),
}
_YES = {"1", "1.0", "true", "yes", "refused", "refusal", "harmful", "unsafe", "jailbroken", "2_full_refusal"}
_NO = {"0", "0.0", "false", "no", "answered", "complied", "compliance", "harmless", "safe", "1_full_compliance"}
HARM_THRESHOLD = 0.5  # of a graded label in [0, 1]


@dataclass(frozen=True)
class Exchange:
    """A request and an answer to it, as a judge sees them."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class LabelledSet:
    """Exchanges with labels: ``labels[i]`` says whether exchange i is of the class that ``question`` names."""

    name: str
    question: Question
    exchanges: tuple[Exchange, ...]
    labels: tuple[bool, ...]
    left_out: int = 0

    @property
    def sha256(self) -> str:
        """Hash of texts and labels in order (16 hex digits)."""
        rows = [(one.prompt, one.answer, label) for one, label in zip(self.exchanges, self.labels, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def read_labelled(path: str | Path, question: Question, *, label: str | None = None) -> LabelledSet:
    """Read a file of labelled answers.

    Args:
        path: JSON Lines, CSV, TSV or JSON. question: what the label says. label: its column, where it has another name.

    Rows whose label is neither yes nor no ("partial refusal") are left out and counted.

    Raises:
        DataError: missing or malformed file, no usable column, fewer than two answers of either class.
    """
    file = Path(path)
    rows = _rows(file)
    columns = (label,) if label else _LABELS[question]
    exchanges, labels, left_out = [], [], 0
    for number, row in enumerate(rows, 1):
        prompt, answer = pick(row, _PROMPT), pick(row, _ANSWER)
        verdict = _verdict(row, columns)
        if answer is None or verdict is None:
            if not any(column in row for column in columns) or not any(column in row for column in _ANSWER):
                seen = f"{file}, row {number}; columns: {', '.join(map(str, row))}"
                fix = f"name the columns prompt, answer and {columns[0]}"
                raise DataError("no label or no answer in a row of labelled answers", seen=seen, fix=fix)
            left_out += 1
            continue
        exchanges.append(Exchange(str(prompt or ""), str(answer)))
        labels.append(verdict)
    found = LabelledSet(file.stem, question, tuple(exchanges), tuple(labels), left_out)
    if min(sum(labels), len(labels) - sum(labels)) < 2:
        seen = f"{file}: {sum(labels)} yes, {len(labels) - sum(labels)} no, {left_out} neither"
        raise DataError(
            f"labelled answers need at least two of each class ({question} or not)",
            seen=seen,
            fix="label more answers of the rarer class",
        )
    return found


def joined(name: str, sets: Sequence[LabelledSet]) -> LabelledSet:
    """Several sets about the same question as one."""
    if not sets or len({one.question for one in sets}) != 1:
        raise DataError(
            "sets about different questions cannot be joined",
            seen=[one.question for one in sets],
            fix="join sets of one question",
        )
    return LabelledSet(
        name,
        sets[0].question,
        tuple(exchange for one in sets for exchange in one.exchanges),
        tuple(label for one in sets for label in one.labels),
        sum(one.left_out for one in sets),
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    """Rows of any known layout; a comment line above a CSV header and JailbreakBench's wrapper are stepped over."""
    if file.suffix == ".csv":
        text = read_text(file)
        body = text.partition("\n")[2] if text.startswith("#") else text
        rows = list(csv.DictReader(body.splitlines(keepends=True)))
        if not rows:
            raise DataError("that file of labelled answers is empty", seen=file, fix="check the path")
        return rows
    if file.suffix == ".json":
        try:
            content = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise DataError(
                "malformed JSON", seen=f"{file}, line {error.lineno}: {error.msg}", fix="mend that line"
            ) from error
        if isinstance(content, dict) and isinstance(content.get("jailbreaks"), list):
            return list(content["jailbreaks"])
    return read_rows(file)


def _verdict(row: Mapping[str, Any], columns: Sequence[str]) -> bool | None:
    value = next((row[column] for column in columns if row.get(column) not in (None, "")), None)
    if value is None or isinstance(value, bool):
        return value
    text = str(value).strip().casefold()
    if text in _YES or text in _NO:
        return text in _YES
    try:
        number = float(text)
    except ValueError:
        return None
    return number >= HARM_THRESHOLD if 0.0 <= number <= 1.0 else None
