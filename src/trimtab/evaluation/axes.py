"""What may be put to a model: the kinds of axis, and how a person names one.

Covered: parsing ``KIND:DATASET=PATH?setting=value``, loading the prompts of an axis, the axes of a run where none is
named. Not covered: running them (``runner.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.evaluation.axis_settings import check_settings, settings_in
from trimtab.evaluation.catalogue import BENIGN, CATALOGUE
from trimtab.evaluation.datasets import PromptSet, bundled_tickets, load_prompts, load_questions
from trimtab.evaluation.windows import text_windows

KINDS = (
    *("compliance", "over_refusal", "jailbreak", "accuracy", "choice", "rouge", "lm_eval", "perplexity", "structeval"),
)


@dataclass(frozen=True)
class AxisSpec:
    """One question to put to a model.

    Attributes:
        kind: one of ``KINDS``.
        dataset: "bundled", or a name in ``catalogue.CATALOGUE``, or (with ``path``) any name; "tickets" for the bundled
            classification task; of a jailbreak its method (``jailbreaks.METHODS``), of lm_eval the task's name.
        path: a local file or folder; the hub is then never asked.
        revision: commit of the hub's data set to pin.
        split: of the bundled sets.
        limit: at most so many prompts.
        match: accuracy only: "choice", "exact", "number" or "gsm8k".
        which: rouge only: "rouge1", "rouge2" or "rougeL".
        window_chars: perplexity only.
    """

    kind: str
    dataset: str = "bundled"
    path: str | None = None
    revision: str | None = None
    split: str = "eval"
    limit: int | None = None
    match: str | None = None
    window_chars: int = 2000
    which: str = "rougeL"

    @classmethod
    def parse(cls, text: str, *, limit: int | None = None) -> AxisSpec:
        """``KIND``, ``KIND:DATASET``, ``KIND:DATASET=PATH`` or ``KIND=PATH``; a data set alone tells its kind.

        Settings of one axis follow behind a question mark, as in a model's name: ``?match=gsm8k&limit=100``.

        Examples: ``compliance``, ``compliance:advbench?revision=e3d1``, ``xstest-safe=prompts.csv``,
        ``accuracy=test.jsonl?match=gsm8k``, ``rouge=dialogues.jsonl?which=rouge1``.

        Raises:
            UsageError: an unknown kind; an unknown setting, or one that this kind of axis does not have.
        """
        body, settings = settings_in(text)
        name, _, path = body.partition("=")
        kind, _, dataset = name.partition(":")
        if kind not in KINDS:
            kind, dataset = ("over_refusal" if kind in BENIGN else "compliance"), kind
            _check_known(dataset, path, text)
        default = Path(path).stem if path else "bundled"
        check_settings(kind, settings, text)
        found = cls(kind=kind, dataset=dataset or default, path=path or None, limit=limit)
        return replace(found, **settings)  # type: ignore[arg-type]

    def prompts(self) -> PromptSet:
        """Load what the axis asks.

        Raises:
            DataError, UsageError: as ``datasets.load_prompts``.
        """
        if self.kind in ("compliance", "over_refusal"):
            side = "harmful" if self.kind == "compliance" else "benign"
            return load_prompts(
                self.dataset, side=side, split=self.split, path=self.path, revision=self.revision, limit=self.limit
            )
        if self.kind == "jailbreak":
            return load_prompts(side="harmful", split=self.split, limit=self.limit)
        if self.kind in ("choice", "rouge"):
            if self.path is None:
                raise UsageError(f"{self.kind} needs a file of questions", fix=f"{self.kind}=FILE.jsonl")
            return load_questions(self.path, limit=self.limit)
        if self.kind == "structeval":
            from trimtab.evaluation import structured

            return structured.prompt_set(structured.axis_tasks(self.dataset, self.path, self.limit), self.dataset)
        if self.kind == "lm_eval":
            return PromptSet(self.dataset, ())  # lm-eval loads them itself
        if self.kind == "accuracy":
            if self.path is not None:
                name = "" if self.dataset == "bundled" else self.dataset
                return load_questions(self.path, name=name, limit=self.limit)
            if self.dataset not in ("bundled", "tickets"):
                raise UsageError(
                    "unknown set of questions", seen=self.dataset, fix="use tickets, or accuracy=FILE.jsonl"
                )
            return bundled_tickets(split=self.split, limit=self.limit)
        if self.kind != "perplexity":
            raise UsageError("unknown kind of axis", seen=self.kind, fix=f"use one of: {', '.join(KINDS)}")
        if self.path is None:
            raise UsageError("perplexity needs a text file", fix="perplexity=FILE.txt")
        return text_windows(self.path, window_chars=self.window_chars).limited(self.limit)


def with_match(specs: Sequence[AxisSpec], match: str) -> list[AxisSpec]:
    """The same axes; those of accuracy without a way to match of their own get this one.

    Raises:
        UsageError: where no axis is one of accuracy, so that it would do nothing.
    """
    if not any(spec.kind == "accuracy" for spec in specs):
        raise UsageError("--match does nothing without an accuracy axis", seen=match, fix="add --axis accuracy=FILE")
    return [replace(spec, match=match) if spec.kind == "accuracy" and not spec.match else spec for spec in specs]


def default_axes(
    *, limit: int | None = None, accuracy_file: str | None = None, perplexity_file: str | None = None
) -> list[AxisSpec]:
    """Compliance and over-refusal on the bundled prompts (incoherence follows); more where a file is given."""
    axes = [AxisSpec("compliance", limit=limit), AxisSpec("over_refusal", limit=limit)]
    if accuracy_file:
        axes.append(AxisSpec("accuracy", dataset=Path(accuracy_file).stem, path=accuracy_file, limit=limit))
    if perplexity_file:
        axes.append(AxisSpec("perplexity", dataset=Path(perplexity_file).stem, path=perplexity_file, limit=limit))
    return axes


def with_limit(axis: AxisSpec, limit: int | None) -> AxisSpec:
    """The axis with a limit, unless it has one of its own."""
    return axis if axis.limit is not None or limit is None else replace(axis, limit=limit)


def _check_known(dataset: str, path: str, text: str) -> None:
    if dataset not in CATALOGUE and dataset != "bundled" and not path:
        fix = f"use a kind ({', '.join(KINDS)}), a known set ({', '.join(CATALOGUE)}), or NAME=PATH"
        raise UsageError("unknown axis", seen=text, fix=fix)
