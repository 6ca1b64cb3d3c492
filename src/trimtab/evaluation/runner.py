"""Measure a model on several axes, in this process, and leave inspect logs.

Covered: which axes, one progress bar, resuming (an axis whose finished log has the same model, prompts, settings
and judge is not run again), the summary file.
Not covered: comparing (``trimtab.comparison``), servers (use inspect with its own providers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.comparison.records import Run
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import logs as logs_module
from trimtab.evaluation.catalogue import BENIGN, CATALOGUE
from trimtab.evaluation.datasets import PromptSet, bundled_tickets, load_prompts, load_questions
from trimtab.evaluation.folders import alone_in
from trimtab.evaluation.summary import write_summary
from trimtab.evaluation.windows import text_windows
from trimtab.models import LoadedModel, fingerprint, load

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.log import EvalLog

#: A measurement of at most so many batches runs all its axes at once, so that they share batches. A larger one runs
#: them one after the other, so that an interruption loses one axis at most.
TOGETHER_BATCHES = 8
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

    @classmethod
    def parse(cls, text: str, *, limit: int | None = None) -> AxisSpec:
        """``KIND``, ``KIND:DATASET``, ``KIND:DATASET=PATH`` or ``KIND=PATH``; a data set alone tells its kind.

        Examples: ``compliance``, ``compliance:advbench``, ``xstest-safe=prompts.csv``, ``accuracy=my.jsonl``.

        Raises:
            UsageError: an unknown kind.
        """
        name, _, path = text.partition("=")
        kind, _, dataset = name.partition(":")
        if kind not in KINDS:
            kind, dataset = ("over_refusal" if kind in BENIGN else "compliance"), kind
            _check_known(dataset, path, text)
        default = Path(path).stem if path else "bundled"
        return cls(kind=kind, dataset=dataset or default, path=path or None, limit=limit)

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
    batch_size: int = 16,
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
        batch_size: chats in one forward pass.
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
    """
    specs = [_with_limit(axis, limit) for axis in (axes if axes is not None else default_axes())]
    if not specs:
        raise UsageError("no axes to measure", fix="name at least one, e.g. compliance")
    if (seeds > 1) != (temperature > 0.0):
        fix = "give both --seeds N and --temperature T, or neither"
        raise UsageError("several seeds need a temperature, and a temperature several seeds", seen=seeds, fix=fix)
    prompts = [spec.prompts() for spec in specs]  # before the model: a wrong path should not cost a load
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load(model) if isinstance(model, str) else model
    decoding = _decoding(max_new_tokens, temperature, seeds)
    prints = fingerprint(loaded) | {"decoding": decoding}
    identity: dict[str, Any] = {"fingerprint": prints, "model": loaded.name}
    _prepare_judge(judge, loaded, prints["weights"])
    options = _Options(loaded, max_new_tokens, batch_size, judge, seeds, temperature, attacker)
    planned = [_plan(spec, found, identity, options) for spec, found in zip(specs, prompts, strict=True)]
    _check_distinct(planned)
    with alone_in(folder):
        return _measure(loaded, planned, identity, folder, options, progress)


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
        model = provider_for(loaded, batch_size=batch_size, on_answers=bar.update, expected=expected, journal=journal)
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
    from trimtab.evaluation import jailbreaks, structured, tasks, utility

    max_new_tokens = options.max_new_tokens
    if spec.kind == "jailbreak":
        made = jailbreaks.transformed(spec.dataset, prompts, path=spec.path, loaded=options.loaded)
        task = tasks.jailbreak_task(spec.dataset, prompts, made, max_new_tokens, options.judge, options.attacker)
    elif spec.kind == "rouge":
        task = utility.rouge_task(prompts, max_new_tokens)
    elif spec.kind == "choice":
        task = utility.choice_task(prompts)
    elif spec.kind == "structeval":
        chosen = structured.axis_tasks(spec.dataset, spec.path, spec.limit)
        length = max(max_new_tokens, structured.MIN_AXIS_TOKENS)
        task = structured.structured_task(chosen, spec.dataset, length)
    elif spec.kind == "lm_eval":
        task = utility.lm_eval_task(options.loaded, spec.dataset, spec.limit, options.batch_size)
    elif spec.kind == "accuracy":
        task = tasks.accuracy_task(prompts, spec.match, max_new_tokens)
    elif spec.kind == "perplexity":
        task = tasks.perplexity_task(prompts)
    else:
        task = tasks.refusal_task(spec.kind, prompts, spec.dataset, max_new_tokens, options.judge)
    if options.seeds > 1 and spec.kind in ("compliance", "over_refusal", "jailbreak", "accuracy", "rouge"):
        task.config.temperature = options.temperature
        if spec.dataset != "crescendo":
            task.solver = tasks.seeded(options.temperature)
    axis = (task.metadata or {})[logs_module.AXIS_KEY]
    facts = json.dumps([axis, identity["fingerprint"], spec.match], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return _Planned(task, prompts, key, spec.kind not in ("perplexity", "choice", "lm_eval"))


def _decoding(max_new_tokens: int, temperature: float, seeds: int) -> str:
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
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


def _with_limit(axis: AxisSpec, limit: int | None) -> AxisSpec:
    return axis if axis.limit is not None or limit is None else replace(axis, limit=limit)


def _check_known(dataset: str, path: str, text: str) -> None:
    if dataset not in CATALOGUE and dataset != "bundled" and not path:
        fix = f"use a kind ({', '.join(KINDS)}), a known set ({', '.join(CATALOGUE)}), or NAME=PATH"
        raise UsageError("unknown axis", seen=text, fix=fix)


def _check_distinct(planned: Sequence[_Planned]) -> None:
    names = [(plan.task.metadata or {})[logs_module.AXIS_KEY]["name"] for plan in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("an axis is named twice", seen=", ".join(twice), fix="name each data set once")
