"""Structured output as inspect tasks and as an axis of ``trimtab eval`` and ``compare``.

Covered: ``inspect eval trimtab/structeval`` (all or a part) and one task for each quadrant; scores from the text alone
for text formats; pictures, where a renderer is there; a judge, where one is named.
Not covered: what the scores mean (``trimtab.structeval``).

The axis' value is the corrected score, in [0, 1], higher is better; an item that could not be scored has none.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.hooks import Hooks, RunEnd, hooks
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState, generate

from trimtab.evaluation.datasets import Prompt, PromptSet
from trimtab.evaluation.metrics import mean_value, unscored_rate
from trimtab.structeval import faithful, generations, score
from trimtab.structeval import tasks as data
from trimtab.structeval.drawing import Drawing, Drawn
from trimtab.structeval.vqa import Asked, Judge, Verdict, judge_named

KIND = "structeval"
SCORER = "structeval-corrected@1"
MAX_NEW_TOKENS = 2048
MIN_AXIS_TOKENS = 512  # an axis of `trimtab eval` answers in 64 tokens unless told; no document fits in that


@task
def structeval(
    split: str = "",
    output_format: str = "",
    dataset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    judge: str | None = None,
) -> Task:
    """How well does the model write structured output in 18 formats? (higher is better)"""
    chosen = data.load(
        dataset,
        revision=revision,
        splits=split.split(",") if split else (),
        formats=output_format.split(",") if output_format else (),
        limit=limit,
    )
    return structured_task(chosen, split or "all", max_new_tokens, judge)


@task
def structeval_t_gen(dataset: str | None = None, limit: int | None = None) -> Task:
    """StructEval: text to JSON, CSV, TOML, XML, YAML."""
    return structeval("t-gen", dataset=dataset, limit=limit)


@task
def structeval_t_conv(dataset: str | None = None, limit: int | None = None) -> Task:
    """StructEval: conversions between text formats."""
    return structeval("t-conv", dataset=dataset, limit=limit)


@task
def structeval_v_gen(dataset: str | None = None, limit: int | None = None, judge: str | None = None) -> Task:
    """StructEval: text to formats that render."""
    return structeval("v-gen", dataset=dataset, limit=limit, judge=judge)


@task
def structeval_v_conv(dataset: str | None = None, limit: int | None = None, judge: str | None = None) -> Task:
    """StructEval: conversions to formats that render."""
    return structeval("v-conv", dataset=dataset, limit=limit, judge=judge)


def axis_tasks(split: str, path: str | None, limit: int | None) -> list[data.Task]:
    """The tasks of an axis: ``structeval``, ``structeval:t-conv``, ``structeval:t=FILE``; "bundled" means all."""
    named = split in (*data.SPLITS, "t", "v", "gen", "conv")
    return data.load(path, splits=(split,) if named else (), limit=limit)


def prompt_set(chosen: Sequence[data.Task], name: str) -> PromptSet:
    """The tasks as prompts, with ids and categories that comparisons pair on."""
    prompts = tuple(Prompt(id=one.id, category=one.name, text=one.prompt, target=one.output_format) for one in chosen)
    return PromptSet(f"structeval/{name}", prompts)


def structured_task(chosen: Sequence[data.Task], name: str, max_new_tokens: int, judge: str | None = None) -> Task:
    """The inspect task over some StructEval tasks."""
    from trimtab.evaluation.tasks import axis_metadata

    axis = KIND if name in ("all", "bundled") else f"{KIND}:{name}"
    prompts = prompt_set(chosen, name)
    label = f"Writes correct structured output ({name}, at most {max_new_tokens} tokens)"
    metadata = axis_metadata(axis, label, KIND, prompts, SCORER if judge is None else f"{SCORER}+{judge}")
    metadata["trimtab_axis"]["continuous"] = True
    return Task(
        name=axis.replace(":", "-"),
        dataset=MemoryDataset(list(map(_sample, chosen)), name=prompts.name),
        solver=[generate()],
        scorer=structure(judge),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0, seed=0),
        metadata=metadata,
    )


def _sample(one: data.Task) -> Sample:
    row = generations.row_for(one, "")
    del row["generation"]
    return Sample(id=one.id, input=one.prompt, target=one.output_format, metadata={"category": one.name, "row": row})


@scorer(metrics=[mean_value(), unscored_rate()])
def structure(judge: str | None = None) -> Scorer:
    """Official and corrected score of one answer; the value is the corrected one."""

    async def grade(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        one = data.task_from_row(state.metadata["row"], str(state.sample_id))
        answer = state.output.completion
        if one.rendered:
            scored = await _scored_picture(one, answer, judge)
        else:
            scored = score.score_text(one, answer)
        kept = faithful.compare(one, scored.corrected.document)
        return _score(state, answer, scored, kept.score)

    return grade


def _score(state: TaskState, answer: str, scored: score.Scored, kept: float | None) -> Score:
    corrected = scored.corrected
    metadata: dict[str, Any] = {
        "verdict": "unscored" if corrected.score is None else "",
        "value": corrected.score,
        "category": state.metadata.get("category", ""),
        "judge": SCORER,
        "truncated": bool(state.output.choices) and state.output.stop_reason == "max_tokens",
        "official": scored.official._asdict(),
        "syntax": corrected.syntax,
        "keys": corrected.keys,
        "vqa": corrected.vqa,
        "faithful": kept,
        "missing": list(corrected.missing),
        "differences": list(scored.differences),
    }
    value: str | float = "unscored" if corrected.score is None else corrected.score
    return Score(value=value, answer=answer, explanation=corrected.error or "", metadata=metadata)


async def _scored_picture(one: data.Task, answer: str, judge: str | None) -> score.Scored:
    """Render in a thread, with the one renderer of the run; ask the judge in inspect's own loop."""
    found = await asyncio.to_thread(_drawing().draw_all, [generations.Generated(one, answer)])
    made = found[one.id]
    verdict = await _verdict(one, made, judge)
    errors = made.errors + ((verdict.error,) if verdict and verdict.error else ())
    official = verdict.official if verdict else None
    picture = score.Picture(made.status, errors, verdict.score if verdict else None, official, made.png is not None)
    return score.score_picture(one, answer, picture)


async def _verdict(one: data.Task, made: Drawn, judge: str | None) -> Verdict | None:
    if judge is None or made.png is None:
        return None
    return (await _judge(judge).ask_for([Asked(made.png.read_bytes(), one.questions)]))[0]


@lru_cache(maxsize=4)
def _judge(name: str) -> Judge:
    return judge_named(name)


# --- one renderer for all samples of a run ----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _drawing() -> Drawing:
    """Shared by samples that are scored side by side; its programs start with the first picture."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-structeval-"))
    _close_after_run()
    atexit.register(_end_drawing)
    return Drawing(folder, workers=min(2, os.cpu_count() or 1))


def _end_drawing() -> None:
    """End the renderer's programs and remove its pictures: what was scored is in inspect's log."""
    if _drawing.cache_info().currsize:
        drawing = _drawing()
        _drawing.cache_clear()
        _judge.cache_clear()
        drawing.close()
        if drawing.folder is not None:
            shutil.rmtree(drawing.folder, ignore_errors=True)


@lru_cache(maxsize=1)
def _close_after_run() -> None:
    """inspect tells a scorer nothing about the last sample, but a hook about the end of the run.

    Registered with the first picture, not on import: inspect announces hooks that it finds when it starts.
    """

    @hooks(name="trimtab_structeval", description="Ends the renderer of structured output when a run is over.")
    class EndOfRun(Hooks):
        async def on_run_end(self, data: RunEnd) -> None:  # noqa: ARG002
            await asyncio.to_thread(_end_drawing)
