"""Let a model answer StructEval tasks: any model of ``trimtab.models``, or any that inspect can reach.

Covered: the official prompt as one user turn; greedy decoding; a bound on the length (recorded, with what it cut);
appended as it comes, resumed where it stopped; a model in memory, vLLM, OpenAI-compatible servers; nothing but
documents, if asked.
Not covered: scoring, how decoding is constrained (``constrained.py``).

This module alone of the room touches models, and only inside its functions.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, UsageError
from trimtab.structeval import constrained, generations, grammars
from trimtab.structeval.tasks import Task

SERVED = ("openai/", "openai-api/", "vllm/", "sglang/", "ollama/", "hf/", "anthropic/", "google/", "mockllm/")


@dataclass(frozen=True)
class Settings:
    """How to decode. ``max_tokens`` bounds each answer; the reference has no bound, so cut answers are counted.
    ``constrain``: allow nothing but documents of the format (``constrained.py``)."""

    max_tokens: int = 2048
    temperature: float = 0.0
    batch_size: int = 8
    connections: int = 16
    base_url: str | None = None
    constrain: bool = False


@dataclass(frozen=True)
class Progress:
    """``done`` answers are in the file, ``kept`` of them from an earlier run, ``cut`` by the length limit."""

    done: int
    kept: int
    cut: int


def generate(
    model: str,
    tasks: Sequence[Task],
    out: Path,
    settings: Settings = Settings(),
    progress: Callable[[int], Any] | None = None,
) -> Progress:
    """Answer every task and append to ``out`` (JSON Lines, official schema); what is in it already is kept.

    Raises:
        UsageError: ``out`` holds answers of another model or other settings. ModelError, DataError: as ``models.load``
        and inspect's models.
    """
    run = run_key(model, settings)
    rows = generations.read_lines(out)
    if strangers := {row.get("run", {}).get("key") for row in rows} - {run["key"]}:
        seen = f"{out}: {len(rows)} rows, {len(strangers)} other settings"
        raise UsageError("that file holds answers of another model or settings", seen=seen, fix="name another file")
    kept = {row["task_id"] for row in rows}
    todo = [task for task in tasks if task.id not in kept]
    with generations.append(out) as stream:
        for task, answer in _answers(model, todo, settings):
            generations.write_line(stream, generations.row_for(task, answer.pop("text"), **answer, run=run))
            if progress is not None:
                progress(1)
    rows = generations.read_lines(out)
    return Progress(len(rows), len(kept), sum(row.get("stop_reason") == "max_tokens" for row in rows))


def run_key(model: str, settings: Settings) -> dict[str, Any]:
    """What makes two runs the same: model, length, temperature; and a hash of that."""
    relevant = {"model": model} | {
        name: value for name, value in asdict(settings).items() if name not in ("batch_size", "connections", "base_url")
    }
    if not settings.constrain:
        del relevant["constrain"]  # files from before there was this option go on
    text = json.dumps(relevant, sort_keys=True)
    return relevant | {"key": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _answers(model: str, todo: Sequence[Task], settings: Settings) -> Iterator[tuple[Task, dict[str, Any]]]:
    if not todo:
        return iter(())
    if settings.constrain:
        constrained.require(todo, in_memory=not (model.startswith(SERVED) or settings.base_url))
    if model.startswith(SERVED) or settings.base_url:
        return _served(model, todo, settings)
    return _in_memory(model, todo, settings)


def _in_memory(name: str, todo: Sequence[Task], settings: Settings) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Batches of similar length, longest first, so that a lack of memory shows at once."""
    from trimtab import models
    from trimtab.generation import GenerationSettings, render
    from trimtab.generation import generate as answer

    loaded = models.load(name)
    chats = {task.id: [{"role": "user", "content": task.prompt}] for task in todo}
    lengths = {task.id: len(render(loaded, chats[task.id])) for task in todo}
    context = getattr(loaded.model.config, "max_position_embeddings", None) or 10**9
    fitting = [task for task in todo if lengths[task.id] + settings.max_tokens <= context]
    for task in todo:
        if task not in fitting:
            yield task, {"text": "", "stop_reason": "model_length", "input_tokens": lengths[task.id]}
    fitting.sort(key=lambda task: -lengths[task.id])
    how = GenerationSettings(settings.max_tokens, settings.temperature, batch_size=settings.batch_size)
    for start in range(0, len(fitting), settings.batch_size):
        batch = fitting[start : start + settings.batch_size]
        if settings.constrain:
            ids = [render(loaded, chats[task.id]) for task in batch]
            rules = [grammars.grammar(task.output_format, task.prompt) for task in batch]
            answers = constrained.answer(loaded, ids, rules, settings.max_tokens, settings.temperature)
        else:
            answers = answer(loaded, [chats[task.id] for task in batch], how)
        for task, found in zip(batch, answers, strict=True):
            yield (
                task,
                {
                    "text": found.text,
                    "stop_reason": "max_tokens" if found.truncated else "stop",
                    "input_tokens": found.prompt_tokens,
                    "generated_tokens": found.tokens,
                },
            )


def _served(name: str, todo: Sequence[Task], settings: Settings) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Ask a server through inspect, ``connections`` at a time; rows come out in rounds."""
    from inspect_ai.model import GenerateConfig, get_model

    config = GenerateConfig(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        max_connections=settings.connections,
        response_schema=constrained.response_schema() if settings.constrain else None,
    )
    if settings.base_url and not name.startswith(SERVED):
        name = f"openai/{name}"
    model = get_model(name, base_url=settings.base_url, config=config)

    async def one(task: Task) -> dict[str, Any]:
        output = await model.generate(task.prompt)
        usage = output.usage
        return {
            "text": output.completion,
            "stop_reason": output.stop_reason,
            "input_tokens": usage.input_tokens if usage else None,
            "generated_tokens": usage.output_tokens if usage else None,
        }

    async def several(batch: Sequence[Task]) -> list[dict[str, Any] | BaseException]:
        return await asyncio.gather(*map(one, batch), return_exceptions=True)

    with asyncio.Runner() as runner:
        for start in range(0, len(todo), settings.connections):
            batch = todo[start : start + settings.connections]
            for task, found in zip(batch, runner.run(several(batch)), strict=True):
                if isinstance(found, BaseException):
                    fix = "run the same command again: what was answered is kept"
                    raise DataError("the model's server failed", seen=f"{task.id}: {found}"[:300], fix=fix) from found
                yield task, found
