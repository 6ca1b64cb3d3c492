"""Inspect tasks for utility beyond short answers: ROUGE, choice by log-probability, tasks of lm-evaluation-harness.

Covered: ROUGE-1, ROUGE-2 and ROUGE-L by the library rouge-score; multiple choice by the model's own probability of each
option, as MMLU is scored; any lm-eval task, run by lm-eval itself on the model in this process, its per-sample values
kept as an inspect log so that they are paired like everything else.
Not covered: lm-eval tasks whose metrics are not per sample (they are refused).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from trimtab.errors import DataError, TrimtabError, UsageError
from trimtab.evaluation.axis_settings import ROUGES
from trimtab.evaluation.datasets import Prompt, PromptSet, load_questions
from trimtab.evaluation.metrics import RATES, mean_value
from trimtab.evaluation.provider import TrimtabAPI
from trimtab.evaluation.tasks import axis_metadata, plain_name, samples, score_of
from trimtab.evaluation.verdicts import Outcome, correctness
from trimtab.models import LoadedModel

ROUGE, CHOICE = "rouge-score@0.1.2", "choice-log-probability@1"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LM_EVAL_METRICS = ("acc", "exact_match", "acc_norm", "mc1", "f1", "em", "rougeL", "bleu")


@task(name="rouge")
def rouge_of_file(path: str, which: str = "rougeL", limit: int | None = None, max_new_tokens: int = 64) -> Task:
    """How close is the answer to the reference, by ROUGE F1? A file of questions with answers. (higher is better)"""
    return rouge_task(load_questions(path, limit=limit), max_new_tokens, which)


@task(name="choice")
def choice_of_file(path: str, limit: int | None = None) -> Task:
    """Is the right option the likeliest, as MMLU is scored? A file of questions with choices. (higher is better)"""
    return choice_task(load_questions(path, limit=limit))


def rouge_task(questions: PromptSet, max_new_tokens: int, which: str = "rougeL") -> Task:
    """How close is the answer to the reference, by ROUGE F1? (higher is better)

    Raises:
        UsageError: a measure other than rouge1, rouge2 and rougeL.
    """
    if which not in ROUGES:
        raise UsageError("unknown measure of ROUGE", seen=which, fix=f"use one of: {', '.join(ROUGES)}")
    name = f"rouge:{questions.name.partition('[')[0]}"
    return Task(
        name=name.replace(":", "-"),
        dataset=samples(questions),
        solver=[generate()],
        scorer=rouge(which),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0, seed=0),
        metadata=axis_metadata(name, f"{which} F1 ({plain_name(questions)})", "rouge", questions, f"{ROUGE}/{which}"),
    )


def choice_task(questions: PromptSet) -> Task:
    """How often does the model find the right option most likely? (higher is better); needs a model in this process."""
    bare = [one.id for one in questions.prompts if len(one.choices) < 2]
    if bare:
        raise DataError("a question without choices", seen=bare[0], fix="give at least two in the column choices")
    name = f"choice:{questions.name.partition('[')[0]}"
    lettered = PromptSet(questions.name, tuple(map(with_letters, questions.prompts)), questions.revision)
    return Task(
        name=name.replace(":", "-"),
        dataset=samples(lettered),
        solver=[read_choices()],
        scorer=likeliest(),
        metadata=axis_metadata(name, f"Finds the right option ({plain_name(questions)})", "choice", lettered, CHOICE),
    )


def with_letters(one: Prompt) -> Prompt:
    """The question with its options under letters, to be answered by a letter, as MMLU is asked."""
    letters = LETTERS[: len(one.choices)]
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, one.choices, strict=True))
    right = letters[one.choices.index(one.target)]
    return Prompt(
        one.id, one.category, f"{one.text.strip()}\n{options}\nAnswer with the letter.", one.system, one.history,
        right, tuple(letters),
    )  # fmt: skip


@solver
def read_choices() -> Solver:
    """Compare the log-probabilities of the options as the answer's beginning instead of generating."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        api = get_model().api
        if not isinstance(api, TrimtabAPI):
            raise UsageError("choice needs a model in this process", seen=str(get_model()), fix="use trimtab/NAME")
        options = list(state.metadata["choices"])
        chances = await api.continuations(state.messages, options)
        state.metadata["nats"] = chances
        best = options[chances.index(max(chances))] if all(map(_finite, chances)) else ""
        state.output = ModelOutput.from_content(str(get_model()), best)
        return state

    return solve


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


@scorer(metrics=[make() for make in RATES])
def likeliest() -> Scorer:
    """Whether the likeliest option is the right one; unscored where a probability is not a number."""

    async def score(state: TaskState, target: Target) -> Score:
        said = state.output.completion
        outcome = correctness(said == target.text if said else None)
        return score_of(state, said, outcome, CHOICE, f"log-probabilities {state.metadata['nats']}", {})

    return score


@scorer(metrics=[mean_value()])
def rouge(which: str = "rougeL") -> Scorer:
    """ROUGE F1 of the answer against the target; nothing said is unscored."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise TrimtabError("ROUGE needs rouge-score", seen=str(error), fix="pip install 'trimtab[utility]'") from error
    measure = RougeScorer([which], use_stemmer=True)

    async def score(state: TaskState, target: Target) -> Score:
        said = state.output.completion
        value = float(measure.score(target.text, said)[which].fmeasure) if said.strip() else None
        return score_of(
            state, said, Outcome("" if value is not None else "unscored", value), f"{ROUGE}/{which}", "", {}
        )

    return score


def lm_eval_task(loaded: LoadedModel, task: str, limit: int | None, batch_size: int, folder: str | None = None) -> Task:
    """A task of lm-evaluation-harness, measured by lm-eval itself, as an inspect task that only records its values.

    Args:
        folder: of the task's own YAML definition, where it is none of those that lm-eval brings.

    Raises:
        TrimtabError: lm-eval is not installed. DataError: an unknown task, no sample, or no value for each sample.
    """
    rows, metric, version = run_lm_eval(loaded, task, limit, batch_size, folder)
    prompts = PromptSet(task, tuple(Prompt(str(row["id"]), "", row["prompt"]) for row in rows), f"v{version}")
    judge_name = f"lm-eval/{metric}@{version}"
    label = f"{task}, {metric} by lm-eval"
    info = axis_metadata(f"lm_eval:{task}", label, "lm_eval", prompts, judge_name)
    info["trimtab_axis"]["continuous"] = any(row["value"] not in (0.0, 1.0) for row in rows)
    kept = [
        Sample(id=str(row["id"]), input=row["prompt"], metadata={"answer": row["answer"], "value": row["value"]})
        for row in rows
    ]
    return Task(
        name=f"lm_eval-{task}",
        dataset=MemoryDataset(kept, name=task),
        solver=[recorded()],
        scorer=recorded_value(judge_name),
        metadata=info,
    )


@solver
def recorded() -> Solver:
    """The answer that lm-eval already has."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        state.output = ModelOutput.from_content(str(get_model()), str(state.metadata["answer"]))
        return state

    return solve


@scorer(metrics=[mean_value()])
def recorded_value(judge_name: str) -> Scorer:
    """The value that lm-eval already gave."""

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        value = float(state.metadata["value"])
        verdict = {1.0: "correct", 0.0: "incorrect"}.get(value, "")
        return score_of(state, state.output.completion, Outcome(verdict, value), judge_name, "", {})

    return score


def run_lm_eval(
    loaded: LoadedModel, task: str, limit: int | None, batch_size: int, folder: str | None = None
) -> tuple[list[dict[str, Any]], str, str]:
    """Rows with id, prompt, answer and value; the metric's name; the task's version."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TrimtabError("lm-eval is not installed", seen=str(error), fix="pip install 'trimtab[utility]'") from error
    if folder is not None and not Path(folder).is_dir():
        raise DataError("no folder with task definitions there", seen=folder, fix="lm_eval:TASK=FOLDER")
    manager = TaskManager(include_path=folder) if folder else None
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, device=str(loaded.device))
    try:
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True, task_manager=manager
        )
    except (KeyError, ValueError, OSError) as error:
        fix = "check the task's name (`lm-eval ls tasks`) and that its data can be loaded"
        raise DataError("lm-eval could not run that task", seen=f"{task}: {str(error)[:200]}", fix=fix) from error
    logged = (found or {}).get("samples", {}).get(task) or []
    metric = next((name for name in _LM_EVAL_METRICS if logged and name in logged[0]), None)
    if metric is None:
        seen = f"{task}: {len(logged)} samples, columns {sorted(logged[0]) if logged else []}"
        raise DataError("lm-eval gave no value for each sample", seen=seen, fix=f"known: {', '.join(_LM_EVAL_METRICS)}")
    rows = [_row(one, metric) for one in _first_filter(logged)]
    return rows, metric, str(found["versions"].get(task, "?"))


def _first_filter(logged: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval repeats each sample for each of its filters; the first one counts."""
    first = logged[0].get("filter")
    return [one for one in logged if one.get("filter") == first]


def _row(one: dict[str, Any], metric: str) -> dict[str, Any]:
    """The id is a hash of the document, so that it survives another order and another limit."""
    document = json.dumps(one["doc"], sort_keys=True, default=str)
    asked = one["arguments"]
    first = next(iter(asked.values())) if isinstance(asked, dict) else asked[0]
    prompt = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return {
        "id": f"{one['doc_id']}-{hashlib.sha256(document.encode()).hexdigest()[:8]}",
        "prompt": str(prompt),
        "answer": json.dumps(one.get("filtered_resps"), default=str)[:4000],
        "value": float(one[metric]),
    }
