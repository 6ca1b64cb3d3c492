"""The ladder of judges: from a name to something that judges.

Covered: names, loading, refusing a judge that is the model under test. Not covered: the judges themselves.

    rules                                refusal rules (default): offline, instant
    classifier=FOLDER                    a small classifier that `trimtab judge train` wrote
    harmbench, wildguard, llama-guard,   a published checkpoint from the hub; NAME@REVISION pins it,
    strongreject                         NAME=FOLDER or NAME=FOLDER,PROMPT.txt takes a local one
    rubric:MODEL                         any chat model that inspect knows, with a rubric: rubric:openai/NAME,
                                         rubric:trimtab/NAME
    rubric:self                          the model under test grades itself; only if asked for by this name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab.errors import UsageError
from trimtab.evaluation.desk import Desk, Judge
from trimtab.evaluation.judges import JUDGE, Verdict, judge
from trimtab.evaluation.labelled import Exchange, Question

SELF = "rubric:self"


class Awaited(Protocol):
    """A judge as scorers use it."""

    @property
    def name(self) -> str:
        """Name and revision."""

    @property
    def positive(self) -> Question:
        """The class that it looks for."""

    async def verdict(self, exchange: Exchange) -> Verdict:
        """Verdict on one exchange."""


@dataclass(frozen=True)
class Rules:
    """The refusal rules in the shape of a judge."""

    name: str = JUDGE
    positive: Question = "refused"

    def judge_many(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts in order."""
        return [judge(one.prompt, one.answer) for one in exchanges]

    async def verdict(self, exchange: Exchange) -> Verdict:
        """Verdict on one exchange."""
        return judge(exchange.prompt, exchange.answer)


@dataclass
class Batched:
    """A judge that reads many exchanges at once, awaited one by one."""

    judge: Judge

    def __post_init__(self) -> None:
        self._desk = Desk(self.judge)
        self.name, self.positive = self.judge.name, self.judge.positive

    async def verdict(self, exchange: Exchange) -> Verdict:
        """Verdict on one exchange."""
        return await self._desk.verdict(exchange)


def make_judge(name: str = "rules") -> Judge:
    """A judge by its name (see the module's docstring).

    Raises:
        UsageError: an unknown name. ModelError, DataError: it cannot be loaded.
    """
    from trimtab.evaluation.checkpoints import load_checkpoint
    from trimtab.evaluation.classifier import Classifier

    check_name(name)
    if name == "rules":
        return Rules()
    head, _, place = name.partition("=")
    title, _, revision = head.partition("@")
    if title == "classifier":
        return Classifier.load(place)
    if name.startswith("rubric:"):
        return _rubric(name.removeprefix("rubric:"))
    folder, _, prompt = place.partition(",")
    return load_checkpoint(title, location=folder or None, revision=revision or None, prompt_file=prompt or None)


def check_name(name: str) -> None:
    """Whether there is such a judge, before anything is loaded.

    Raises:
        UsageError: an unknown name.
    """
    from trimtab.evaluation.checkpoints import CHECKPOINTS

    head, _, place = name.partition("=")
    title = head.partition("@")[0]
    rubric = name.startswith("rubric:") and len(name) > len("rubric:")
    if not (name == "rules" or (title == "classifier" and place) or title in CHECKPOINTS or rubric):
        known = ["rules", "classifier=FOLDER", *CHECKPOINTS, "rubric:MODEL"]
        raise UsageError("unknown judge", seen=name, fix=f"use one of: {', '.join(known)}")


def _rubric(model: str) -> Judge:
    from inspect_ai.model import get_model

    from trimtab.evaluation.rubric import RubricJudge

    if model == "self":
        fix = "it needs the model under test: use it through `trimtab eval --judge rubric:self`"
        raise UsageError("a model can grade itself only within its own evaluation", seen=SELF, fix=fix)
    return RubricJudge(get_model(model))


def awaited(found: Judge) -> Awaited:
    """The same judge for scorers."""
    return found if hasattr(found, "verdict") else Batched(found)  # type: ignore[return-value]


def refuse_self(found: Judge, model: str, weights: str) -> None:
    """Raise where a judge is the model under test.

    Args:
        model: name of the model under test. weights: the hash of its weights in its fingerprint.

    Raises:
        UsageError: the same weights, or the same name.
    """
    grader = getattr(found, "model", None)
    own = str(getattr(found, "weights", ""))
    if grader is not None:
        api = getattr(grader, "api", None)
        own = api.fingerprint()["weights"] if api is not None and hasattr(api, "fingerprint") else own
    same_name = grader is not None and str(grader).removeprefix("trimtab/") == model.removeprefix("trimtab/")
    if same_name or (own and own == weights):
        fix = f"use another judge, or ask for it by name: {SELF}"
        raise UsageError("the judge is the model under test", seen=found.name, fix=fix)
