"""How often is a judge right? Measured on labelled answers, kept as error rates that a comparison uses.

Covered: counts, accuracy with intervals, a JSON file that ``trimtab compare --judge-errors`` reads. Not covered: what
follows for a comparison (``comparison/judge_error.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.comparison.judge_error import JudgeErrors
from trimtab.comparison.statistics import wilson_interval
from trimtab.errors import DataError
from trimtab.evaluation.desk import Judge
from trimtab.evaluation.labelled import LabelledSet

SCHEMA = "trimtab.judge-errors/1"


@dataclass(frozen=True)
class Calibration:
    """A judge on one or several labelled sets.

    Attributes:
        errors: counts over answers that the judge scored. unscored: answers without a verdict. data: name, hash and
            size of each set. partial: labelled answers that are neither, left out.
    """

    errors: JudgeErrors
    unscored: int
    data: tuple[str, ...]
    partial: int

    @property
    def scored(self) -> int:
        """Answers with a verdict."""
        return self.errors.positives + self.errors.negatives

    @property
    def accuracy(self) -> float:
        """Share of scored answers that were judged as labelled."""
        return (self.errors.true_positive + self.errors.true_negative) / self.scored

    def document(self) -> dict[str, Any]:
        """JSON-ready, with 95 % Wilson intervals."""
        errors = self.errors
        right = errors.true_positive + errors.true_negative
        return {
            "schema": SCHEMA,
            "errors": asdict(errors),
            "unscored": self.unscored,
            "partial": self.partial,
            "data": list(self.data),
            "accuracy": [self.accuracy, *wilson_interval(right, self.scored)],
            "sensitivity": [errors.sensitivity, *wilson_interval(errors.true_positive, errors.positives)],
            "specificity": [errors.specificity, *wilson_interval(errors.true_negative, errors.negatives)],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = self.document()

        def share(key: str) -> str:
            value, low, high = (100 * number for number in found[key])
            return f"{value:.1f} % [{low:.1f}, {high:.1f}]"

        errors = self.errors
        return [
            f"judge {errors.judge}, positive class: {errors.positive}",
            f"  accuracy     {share('accuracy')}, n = {self.scored}",
            f"  sensitivity  {share('sensitivity')}, n = {errors.positives}",
            f"  specificity  {share('specificity')}, n = {errors.negatives}",
            f"  unscored {self.unscored}, labelled neither way {self.partial}",
            *(f"  data: {name}" for name in self.data),
        ]


def calibrate(judge: Judge, sets: Sequence[LabelledSet]) -> Calibration:
    """Measure a judge on labelled answers.

    Unscored answers are counted and left out of the rates, as in an evaluation. "Incoherent" is not of the positive
    class.

    Raises:
        DataError: labels about another question than the judge's, or verdicts of one class of labels only.
    """
    counts = {(label, said): 0 for label in (True, False) for said in (True, False)}
    unscored = 0
    for one in sets:
        if one.question != judge.positive:
            seen = f"{one.name} is about {one.question!r}, {judge.name} about {judge.positive!r}"
            raise DataError(
                "those labels answer another question than the judge",
                seen=seen,
                fix="name labels of the judge's question, or another judge",
            )
        for verdict, label in zip(judge.judge_many(list(one.exchanges)), one.labels, strict=True):
            if verdict.label == "unscored":
                unscored += 1
            else:
                counts[label, verdict.label == judge.positive] += 1
    errors = JudgeErrors(
        judge.name, judge.positive, counts[True, True], counts[True, False], counts[False, False], counts[False, True]
    )
    data = tuple(f"{one.name}@sha256:{one.sha256} (n = {len(one.labels)})" for one in sets)
    return Calibration(errors, unscored, data, sum(one.left_out for one in sets))


def read_errors(path: str | Path) -> JudgeErrors:
    """Error rates from a file that ``trimtab judge calibrate --out`` wrote.

    Raises:
        DataError: missing, malformed, or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] == SCHEMA:
            return JudgeErrors(**content["errors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "cannot read that file of judge errors",
            seen=f"{path}: {error}",
            fix="make one: trimtab judge calibrate JUDGE LABELLED --out FILE",
        ) from error
    fix = "make one: trimtab judge calibrate JUDGE LABELLED --out FILE"
    raise DataError("that file holds no judge errors", seen=f"{path}: schema {content['schema']!r}", fix=fix)


def read_human_labels(path: str | Path) -> dict[str, dict[str, tuple[float, float]]]:
    """People's values by axis and item id, from rows with ``axis``, ``id``, ``base`` and ``candidate`` (0 or 1).

    Raises:
        DataError: a missing column or a value that is not a number.
    """
    from trimtab.evaluation.files import read_rows

    found: dict[str, dict[str, tuple[float, float]]] = {}
    for number, row in enumerate(read_rows(Path(path)), 1):
        try:
            values = (float(row["base"]), float(row["candidate"]))
            found.setdefault(str(row["axis"]), {})[str(row["id"])] = values
        except (KeyError, TypeError, ValueError) as error:
            fix = "give the columns axis, id, base, candidate"
            raise DataError("malformed human label", seen=f"{path}, row {number}: {error}", fix=fix) from error
    return found
