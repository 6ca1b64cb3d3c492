"""Measure a model on several axes, in this process, and leave inspect logs.

Covered: which axes, one progress bar, resuming (an axis whose finished log has the same model, prompts, settings
and judge is not run again), the summary file.
Not covered: comparing (``trimtab.comparison``), servers (use inspect with its own providers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.comparison.records import Run
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import logs as logs_module
from trimtab.evaluation.axes import KINDS, AxisSpec, default_axes, with_limit
from trimtab.evaluation.datasets import PromptSet
from trimtab.evaluation.folders import alone_in
from trimtab.evaluation.judges import FINISHED_TOKENS
from trimtab.evaluation.summary import write_summary
from trimtab.models import LoadedModel, fingerprint, load

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.log import EvalLog
    from tqdm import tqdm

__all__ = ["KINDS", "AxisSpec", "default_axes", "evaluate", "finished"]

#: A measurement of at most so many batches runs all its axes at once, so that they share batches. A larger one runs
#: them one after the other, so that an interruption loses one axis at most.
TOGETHER_BATCHES = 8


@dataclass(frozen=True)
class _Options:
    """What holds for all axes of one measurement."""

    loaded: LoadedModel
    max_new_tokens: int
    batch_size: int
    judge: str
    seeds: int
    temperature: float
    attacker: str | None


@dataclass(frozen=True)
class _Planned:
    """An axis with its task, and the key that says whether a finished log already answers it."""

    task: Task
    prompts: PromptSet
    key: str
    generates: bool


def evaluate(
    model: LoadedModel | str,
    axes: Sequence[AxisSpec] | None = None,
    *,
    out: str | Path,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: bool = True,
    judge: str = "rules",
    seeds: int = 1,
    temperature: float = 0.0,
    attacker: str | None = None,
) -> Run:
    """Measure ``model`` on ``axes`` and write logs and ``results.json`` under ``out``.

    Args:
        model: a loaded model (it need not exist anywhere else), or a name that ``models.load`` takes.
        axes: default ``default_axes()``.
        out: folder; finished axes of the same model, prompts, settings and judge that are already in it are kept.
        limit: at most so many prompts an axis, where the axis sets no limit of its own.
        max_new_tokens: length of an answer. A short limit is enough for refusals and cheap; it is part of the record.
            Below ``judges.FINISHED_TOKENS``, an answer that is cut off after an apology is asked again at that length.
        batch_size: most chats in one forward pass; as many as fit into memory, 64 at most, unless given.
        progress: show a bar on standard error.
        judge: of compliance and jailbreaks, by its name in ``ladder.py``.
        seeds: how often each prompt is answered, each time with another seed; more than one needs a temperature.
        temperature: 0 is greedy.
        attacker: model that leads a crescendo, by inspect's name.

    Returns:
        The run, with the derived axis "incoherence".

    Raises:
        DataError: empty or malformed data; a measurement that failed half way (the message says how to go on).
        ModelError: the model cannot be loaded.
        UsageError: no axis, one named twice, or one that cannot be asked so; several seeds without a temperature, or a
            temperature without several seeds; an unknown judge, or one that is the model under test;
            a crescendo without an attacker.
    """
    specs = [with_limit(axis, limit) for axis in (axes if axes is not None else default_axes())]
    if not specs:
        raise UsageError("no axes to measure", fix="name at least one, e.g. compliance")
    from trimtab.evaluation.ladder import check_name
    from trimtab.generation import fitting_rows

    check_options(specs, seeds, temperature, attacker)
    check_name(judge)
    prompts = [spec.prompts() for spec in specs]  # before the model: a wrong path should not cost a load
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load(model) if isinstance(model, str) else model
    decoding = _decoding(max_new_tokens, temperature, seeds)
    prints = fingerprint(loaded) | {"decoding": decoding}
    texts = {"chat_template": str(loaded.tokenizer.chat_template)}
    identity: dict[str, Any] = {"fingerprint": prints, "model": loaded.name, "texts": texts}
    _prepare_judge(judge, loaded, prints["weights"])
    options = _Options(loaded, max_new_tokens, batch_size or fitting_rows(loaded), judge, seeds, temperature, attacker)
    planned = [_plan(spec, found, identity, options) for spec, found in zip(specs, prompts, strict=True)]
    _check_distinct(planned)
    with alone_in(folder):
        return _measure(loaded, planned, identity, folder, options, progress)


def check_options(axes: Sequence[AxisSpec], seeds: int, temperature: float, attacker: str | None) -> None:
    """What can be refused before a model is loaded or a log begun.

    Raises:
        UsageError: options that do not go together.
    """
    if (seeds > 1) != (temperature > 0.0):
        fix = "give both --seeds N and --temperature T, or neither"
        raise UsageError("several seeds need a temperature, and a temperature several seeds", seen=seeds, fix=fix)
    if not attacker and any(axis.kind == "jailbreak" and axis.dataset == "crescendo" for axis in axes):
        from trimtab.evaluation.crescendo import no_attacker

        raise no_attacker()


def _measure(
    loaded: LoadedModel,
    planned: Sequence[_Planned],
    identity: dict[str, Any],
    folder: Path,
    options: _Options,
    progress: bool,
) -> Run:
    """Run what is not finished, then read everything back and write the summary."""
    kept = finished(folder)
    todo = [plan for plan in planned if plan.key not in kept]
    (folder / logs_module.SUMMARY).unlink(missing_ok=True)
    fresh = _run(loaded, todo, identity, folder, options, progress) if todo else {}
    files = [(fresh | kept)[plan.key] for plan in planned]
    run = logs_module.run_from_logs([logs_module.read_log(path) for path in files])
    write_summary(run, folder, files)
    return run


def finished(folder: Path) -> dict[str, Path]:
    """Finished logs in a folder by their resume key. Unreadable logs are passed over: those axes are run again."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.eval")):
        try:
            log = logs_module.open_log(path, header_only=True)
        except DataError:
            continue
        stored = (log.eval.metadata or {}).get(logs_module.RUN_KEY) or {}
        if log.status == "success" and stored.get("key"):
            found[str(stored["key"])] = path
    return found


def _run(
    loaded: LoadedModel,
    todo: Sequence[_Planned],
    identity: dict[str, Any],
    folder: Path,
    options: _Options,
    progress: bool,
) -> dict[str, Path]:
    """Run the planned axes in one ``inspect_ai.eval``; log files by key."""
    from inspect_ai import Epochs
    from inspect_ai import eval as inspect_eval
    from tqdm import tqdm

    from trimtab.evaluation import tasks
    from trimtab.evaluation.journal import Journal, Remembered
    from trimtab.evaluation.provider import provider_for

    for plan in todo:
        plan.task.metadata = (plan.task.metadata or {}) | {logs_module.RUN_KEY: identity | {"key": plan.key}}
    batch_size = options.batch_size
    total = options.seeds * sum(len(plan.prompts.prompts) for plan in todo)
    scope = hashlib.sha256(json.dumps(identity["fingerprint"], sort_keys=True).encode()).hexdigest()[:12]
    journal = Journal(folder / f".answers-{scope}.jsonl")
    complete = False
    with tqdm(total=total, unit="prompt", desc=f"measuring {loaded.name}", disable=not progress) as bar:
        asked = options.seeds * sum(len(plan.prompts.prompts) for plan in todo if plan.generates)
        together = asked <= TOGETHER_BATCHES * batch_size
        expected = asked if together else 0
        counted = _up_to(total, bar)
        model = provider_for(loaded, batch_size=batch_size, on_answers=counted, expected=expected, journal=journal)
        waiting = max(1, options.seeds * max(len(plan.prompts.prompts) for plan in todo))
        if options.judge == "rubric:self":
            _put_self_to_work(model)
        at_work = tasks.judge_for("compliance", options.judge) if options.judge != "rules" else None
        if at_work is not None:
            tasks.put_to_work(options.judge, Remembered(at_work, journal))
        try:
            logs = inspect_eval(
                [plan.task for plan in todo],
                model=model,
                log_dir=str(folder),
                log_format="eval",
                log_realtime=False,
                display="none",
                max_samples=min(waiting, model.api.max_connections()),
                max_connections=model.api.max_connections(),
                adaptive_connections=False,  # nothing to adapt to: the model is in this process
                max_tasks=len(todo) if together else 1,
                epochs=Epochs(options.seeds, "mode") if options.seeds > 1 else None,
            )
            complete = all(log.status == "success" for log in logs)
        finally:
            model.api.close()
            journal.close(complete=complete)
            if at_work is not None:
                tasks.put_to_work(options.judge, at_work)
    return {_key(log): _finished_path(log) for log in logs}


def _up_to(total: int, bar: tqdm[Any]) -> Callable[[int], object]:
    """Advance a bar, never past its end: undecided answers, crescendos and ``rubric:self`` ask the model again."""
    return lambda count: bar.update(min(count, total - bar.n))


def _finished_path(log: EvalLog) -> Path:
    path = Path(log.location.removeprefix("file://"))
    if log.status != "success":
        reason = log.error.message.strip().splitlines()[0] if log.error and log.error.message.strip() else log.status
        fix = "run the same command again: finished axes are kept"
        raise DataError(f"measuring {log.eval.task} did not finish", seen=reason, fix=fix)
    return path


def _key(log: EvalLog) -> str:
    return str((log.eval.metadata or {})[logs_module.RUN_KEY]["key"])


def _plan(spec: AxisSpec, prompts: PromptSet, identity: dict[str, Any], options: _Options) -> _Planned:
    from trimtab.evaluation import answering, jailbreaks, structured, tasks, utility

    max_new_tokens = options.max_new_tokens
    if spec.kind == "jailbreak":
        made = jailbreaks.transformed(spec.dataset, prompts, path=spec.path, loaded=options.loaded)
        task = tasks.jailbreak_task(spec.dataset, prompts, made, max_new_tokens, options.judge, options.attacker)
    elif spec.kind == "rouge":
        task = utility.rouge_task(prompts, max_new_tokens, spec.which)
    elif spec.kind == "choice":
        task = utility.choice_task(prompts)
    elif spec.kind == "structeval":
        chosen = structured.axis_tasks(spec.dataset, spec.path, spec.limit)
        length = max(max_new_tokens, structured.MIN_AXIS_TOKENS)
        task = structured.structured_task(chosen, spec.dataset, length)
    elif spec.kind == "lm_eval":
        task = utility.lm_eval_task(options.loaded, spec.dataset, spec.limit, options.batch_size, spec.path)
    elif spec.kind == "accuracy":
        task = tasks.accuracy_task(prompts, spec.match, max_new_tokens)
    elif spec.kind == "perplexity":
        task = tasks.perplexity_task(prompts)
    else:
        task = tasks.refusal_task(spec.kind, prompts, spec.dataset, max_new_tokens, options.judge)
    if options.seeds > 1 and spec.kind in ("compliance", "over_refusal", "jailbreak", "accuracy", "rouge"):
        task.config.temperature = options.temperature
        if spec.dataset != "crescendo":
            task.solver = answering.sampled(options.temperature, counts_refusals=spec.kind in logs_module.JUDGED)
    axis = (task.metadata or {})[logs_module.AXIS_KEY]
    facts = json.dumps([axis, identity["fingerprint"], spec.match], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return _Planned(task, prompts, key, spec.kind not in ("perplexity", "choice", "lm_eval"))


def _decoding(max_new_tokens: int, temperature: float, seeds: int) -> str:
    """The settings that make an answer, as JSON. Under a short limit undecided answers are longer, which is one."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if max_new_tokens < FINISHED_TOKENS:
        settings["undecided_max_new_tokens"] = FINISHED_TOKENS
    return json.dumps(settings | ({"seeds": seeds} if seeds > 1 else {}), sort_keys=True)


def _prepare_judge(name: str, loaded: LoadedModel, weights: str) -> None:
    """Load the judge before anything is generated; the model under test judges only if it is asked to by name."""
    from trimtab.evaluation import tasks
    from trimtab.evaluation.ladder import SELF, Rules, awaited, make_judge, refuse_self

    if name == SELF:
        tasks.put_to_work(name, Rules(f"{SELF}/{loaded.name}", "harmful"))  # until the provider is there
        return
    if name != "rules":
        found = make_judge(name)
        refuse_self(found, loaded.name, weights)
        tasks.put_to_work(name, awaited(found))


def _put_self_to_work(model: Any) -> None:
    from trimtab.evaluation import tasks
    from trimtab.evaluation.ladder import SELF
    from trimtab.evaluation.rubric import RubricJudge

    tasks.put_to_work(SELF, RubricJudge(model))


def _check_distinct(planned: Sequence[_Planned]) -> None:
    names = [(plan.task.metadata or {})[logs_module.AXIS_KEY]["name"] for plan in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("an axis is named twice", seen=", ".join(twice), fix="name each data set once")
