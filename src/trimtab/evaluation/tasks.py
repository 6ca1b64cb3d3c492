"""Inspect tasks: harmful compliance, over-refusal, jailbreaks, accuracy, perplexity.

Covered: ``inspect eval trimtab/safety --model trimtab/demo`` and the same from ``runner.py``; jailbreaks; scorers that
record verdict, category and judge with every sample.
Not covered: ROUGE, choice and lm-eval (``utility.py``). No task has a ``grader`` role, so that no model ever grades
itself unless it is asked to by name (``ladder.py``).
"""

from __future__ import annotations

from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from trimtab.errors import UsageError
from trimtab.evaluation import jailbreaks, verdicts
from trimtab.evaluation.answering import finished
from trimtab.evaluation.axis_settings import MATCHES
from trimtab.evaluation.catalogue import BENIGN, CATALOGUE
from trimtab.evaluation.crescendo import crescendo
from trimtab.evaluation.datasets import Prompt, PromptSet, bundled_tickets, load_prompts, load_questions
from trimtab.evaluation.grading import is_correct
from trimtab.evaluation.labelled import Exchange
from trimtab.evaluation.ladder import Awaited, Rules, awaited, make_judge
from trimtab.evaluation.metrics import RATES, mean_nats
from trimtab.evaluation.provider import TrimtabAPI
from trimtab.evaluation.verdicts import LOWER_IS_BETTER, Outcome
from trimtab.evaluation.windows import text_windows

MAX_NEW_TOKENS = 64
GRADER = "label-match@1"
LIKELIHOOD = "likelihood@1"


@task
def safety(
    dataset: str = "bundled",
    path: str | None = None,
    revision: str | None = None,
    split: str = "eval",
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    judge: str = "rules",
) -> Task:
    """How often does the model go along with harmful requests? (lower is better)"""
    prompts = load_prompts(dataset, side="harmful", split=split, path=path, revision=revision, limit=limit)
    return refusal_task("compliance", prompts, dataset, max_new_tokens, judge)


@task
def jailbreak(
    method: str = "prefill",
    file: str | None = None,
    dataset: str = "bundled",
    path: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    judge: str = "rules",
    attacker: str | None = None,
) -> Task:
    """How often does the model go along when it is asked in a way that gets round refusals? (lower is better)"""
    prompts = load_prompts(dataset, side="harmful", path=path, limit=limit)
    made = jailbreaks.transformed(method, prompts, path=file)
    return jailbreak_task(method, prompts, made, max_new_tokens, judge, attacker)


@task
def over_refusal(
    dataset: str = "bundled",
    path: str | None = None,
    revision: str | None = None,
    split: str = "eval",
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Task:
    """How often does the model refuse innocent requests? (lower is better)"""
    prompts = load_prompts(dataset, side="benign", split=split, path=path, revision=revision, limit=limit)
    return refusal_task("over_refusal", prompts, dataset, max_new_tokens)


@task
def accuracy(
    path: str | None = None, match: str | None = None, limit: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> Task:
    """How often is the answer right? A JSON Lines file of questions, or the bundled tickets. (higher is better)"""
    questions = load_questions(path, limit=limit) if path else bundled_tickets(limit=limit)
    return accuracy_task(questions, match, max_new_tokens)


@task
def perplexity(path: str, window_chars: int = 2000, limit: int | None = None) -> Task:
    """Negative log-likelihood per token of a text file, by non-overlapping windows. (lower is better)"""
    return perplexity_task(text_windows(path, window_chars=window_chars).limited(limit))


def refusal_task(kind: str, prompts: PromptSet, dataset: str, max_new_tokens: int, judge: str = "rules") -> Task:
    """The task behind ``safety`` and ``over_refusal``.

    Args:
        judge: see ``ladder.py``. Over-refusal is about language: a judge of harm leaves it to the refusal rules.

    Raises:
        UsageError: an innocent set asked about compliance, or a harmful one about over-refusal.
    """
    if dataset in CATALOGUE and (dataset in BENIGN) != (kind == "over_refusal"):
        asked = "innocent" if dataset in BENIGN else "harmful"
        fix = f"measure {'over_refusal' if dataset in BENIGN else 'compliance'} on it"
        raise UsageError(f"{dataset} holds {asked} requests: {kind} on it means nothing", seen=dataset, fix=fix)
    name = kind if dataset == "bundled" else f"{kind}:{dataset}"
    question = {"compliance": "Complies with harmful requests", "over_refusal": "Refuses innocent requests"}[kind]
    source = "bundled" if dataset == "bundled" else (CATALOGUE[dataset].title if dataset in CATALOGUE else dataset)
    return Task(
        name=name.replace(":", "-"),
        dataset=samples(prompts),
        solver=[generate(), finished()],
        scorer=judged(kind, judge),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0, seed=0),
        metadata=axis_metadata(name, f"{question} ({source})", kind, prompts, judge_for(kind, judge).name),
    )


def jailbreak_task(
    method: str, prompts: PromptSet, made: PromptSet, max_new_tokens: int, judge: str = "rules", attacker: Any = None
) -> Task:
    """The task behind ``jailbreak``.

    Args:
        prompts: the requests. made: the same under the method. attacker: of a crescendo.

    The data set that the axis records is that of the requests where the method depends on the model (GCG, crescendo):
    two models are then compared on the same requests, each under its own attack.
    """
    recorded = prompts if method in ("gcg", "crescendo") else made
    return Task(
        name=f"jailbreak-{method}",
        dataset=samples(made),
        solver=[crescendo(attacker)] if method == "crescendo" else [generate(), finished()],
        scorer=judged("jailbreak", judge),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0, seed=0),
        metadata=axis_metadata(
            f"jailbreak:{method}",
            f"Goes along under a jailbreak ({method})",
            "jailbreak",
            recorded,
            judge_for("jailbreak", judge).name,
        ),
    )


def accuracy_task(questions: PromptSet, match: str | None, max_new_tokens: int) -> Task:
    """The task behind ``accuracy``."""
    if match not in (None, *MATCHES):
        raise UsageError("unknown way to match answers", seen=match, fix=f"use one of: {', '.join(MATCHES)}")
    short = "" if questions.name.startswith("bundled/") else f":{questions.name.partition('[')[0]}"
    return Task(
        name=f"accuracy{short}".replace(":", "-"),
        dataset=samples(questions),
        solver=[generate()],
        scorer=label_match(match),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0, seed=0),
        metadata=axis_metadata(
            f"accuracy{short}",
            f"Answers correctly ({plain_name(questions)})",
            "accuracy",
            questions,
            grader_name(match),
        ),
    )


def perplexity_task(windows: PromptSet) -> Task:
    """The task behind ``perplexity``; it needs a model in this process."""
    return Task(
        name="perplexity",
        dataset=samples(windows),
        solver=[read_text()],
        scorer=mean_likelihood(),
        metadata=axis_metadata(
            "perplexity", f"Perplexity ({windows.name.partition('/')[0]})", "perplexity", windows, LIKELIHOOD
        ),
    )


def plain_name(prompts: PromptSet) -> str:
    """For people: without the number of items, which stands beside every rate ("bundled tickets")."""
    return prompts.name.partition("[")[0].removesuffix("/eval").replace("/", " ")


def axis_metadata(name: str, label: str, kind: str, prompts: PromptSet, judge_name: str) -> dict[str, Any]:
    """What ``logs.py`` needs to make an axis of a log."""
    return {
        "trimtab_axis": {
            "name": name,
            "label": label,
            "kind": kind,
            "lower_is_better": LOWER_IS_BETTER[kind],
            "judge": judge_name,
            "dataset": prompts.label,
            "continuous": kind in ("perplexity", "rouge"),
        }
    }


def samples(prompts: PromptSet) -> MemoryDataset:
    """Inspect samples with the prompts' ids and categories."""
    return MemoryDataset(list(map(_sample, prompts.prompts)), name=prompts.name)


def _sample(prompt: Prompt) -> Sample:
    makers = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    chat: list[ChatMessage] = [makers[turn["role"]](content=turn["content"]) for turn in prompt.messages]
    return Sample(
        id=prompt.id,
        input=chat if len(chat) > 1 else prompt.text,
        target=prompt.target,
        metadata={"category": prompt.category, "choices": list(prompt.choices), "request": prompt.request},
    )


# --- scorers ----------------------------------------------------------------------------------------------------------


_AT_WORK: dict[str, Awaited] = {"rules": Rules()}  # judges by name: a checkpoint is loaded once for all its axes


def put_to_work(name: str, found: Awaited) -> None:
    """Let scorers find a judge under a name; the runner does this for judges that only exist in this process."""
    _AT_WORK[name] = found


def judge_for(kind: str, name: str) -> Awaited:
    """The judge of an axis: over-refusal is a matter of language, which judges of harm do not see."""
    if name not in _AT_WORK:
        put_to_work(name, awaited(make_judge(name)))
    found = _AT_WORK[name]
    return _AT_WORK["rules"] if kind == "over_refusal" and found.positive == "harmful" else found


@scorer(metrics=[make() for make in RATES])
def judged(kind: str, judge: str = "rules") -> Scorer:
    """Verdicts by a judge of the ladder, as compliance or as over-refusal.

    What is judged is the request itself, not what a jailbreak made of it.
    """
    outcome_of = verdicts.over_refusal if kind == "over_refusal" else verdicts.compliance

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        answer = state.output.completion
        at_work = judge_for(kind, judge)
        verdict = await at_work.verdict(Exchange(str(state.metadata.get("request") or state.input_text), answer))
        extra = {"label": verdict.label, "coherent": verdict.coherent, "grade": verdict.grade}
        return score_of(state, answer, outcome_of(verdict), at_work.name, verdict.reason, extra)

    return score


def grader_name(match: str | None) -> str:
    """Name of the rule, with the way to match where it was chosen: two ways are never compared."""
    return f"{GRADER}/{match}" if match else GRADER


@scorer(metrics=[make() for make in RATES])
def label_match(match: str | None = None) -> Scorer:
    """Right or wrong, by ``grading.is_correct``."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        correct = is_correct(answer, target.text, state.metadata.get("choices") or (), match)  # type: ignore[arg-type]
        return score_of(
            state, answer, verdicts.correctness(correct), grader_name(match), f"expected {target.text!r}", {}
        )

    return score


@solver
def read_text() -> Solver:
    """Score the sample's text under the model instead of generating."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        api = get_model().api
        if not isinstance(api, TrimtabAPI):
            fix = "use --model trimtab/NAME"
            raise UsageError("perplexity needs a model in this process", seen=str(get_model()), fix=fix)
        (found,) = await api.likelihood([state.input_text])
        state.metadata["nats"], state.metadata["tokens"] = found.nats, found.tokens
        return state

    return solve


@scorer(metrics=[mean_nats()])
def mean_likelihood() -> Scorer:
    """The value that ``read_text`` left: nats per token of one window."""

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        nats, tokens = state.metadata["nats"], state.metadata["tokens"]
        extra = {"nats": nats, "tokens": tokens, "bytes": len(state.input_text.encode("utf-8", "replace"))}
        return score_of(state, "", Outcome("", nats / tokens), LIKELIHOOD, "", extra)

    return score


def score_of(
    state: TaskState, answer: str, outcome: Outcome, judge_name: str, reason: str, extra: dict[str, Any]
) -> Score:
    """A score whose metadata ``logs.py`` and ``metrics.py`` read."""
    metadata = {
        "verdict": outcome.verdict,
        "value": outcome.value,
        "category": state.metadata.get("category", ""),
        "judge": judge_name,
        "truncated": bool(state.output.choices) and state.output.stop_reason == "max_tokens",
        **extra,
    }
    value: str | float = outcome.verdict or (outcome.value if outcome.value is not None else "unscored")
    return Score(value=value, answer=answer, explanation=reason, metadata=metadata)
