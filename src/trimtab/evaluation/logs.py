"""Inspect logs in a folder, read as a ``comparison.records.Run``.

Covered: finished logs with their axes, the incoherence axis that follows from the same answers, folders without logs,
unfinished, failed and corrupt logs, logs of two different models.
Not covered: running anything (``runner.py``), the summary file (``summary.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.comparison.records import Axis, Item, Run
from trimtab.errors import DataError
from trimtab.evaluation.verdicts import incoherence

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

AXIS_KEY = "trimtab_axis"  # in a log's metadata: name, label, kind, direction, judge, data set
RUN_KEY = "trimtab_run"  # in a log's metadata: model, fingerprint, settings
SUMMARY = "results.json"
JUDGED = ("compliance", "over_refusal", "jailbreak")  # kinds of axis that count refusals


def read_run(folder: str | Path) -> Run:
    """The measurement in a folder.

    Where a finished run left ``results.json``, the logs that it names are read; otherwise every log in the folder, the
    newest for each axis.

    Raises:
        DataError: no logs; an unfinished, failed or corrupt log; logs of different models.
    """
    return run_from_logs([read_log(path) for path in log_files(Path(folder))])


def log_files(folder: Path) -> list[Path]:
    """The logs of a folder (or the one log that the path names), oldest first.

    Raises:
        DataError: where there are none, or one that the summary names is gone.
    """
    if folder.is_file() and folder.suffix == ".eval":
        return [folder]
    if not folder.is_dir():
        raise DataError("no run at that path", seen=folder, fix="name a folder that `trimtab eval --out FOLDER` wrote")
    named = _named_by_summary(folder / SUMMARY)
    for path in named:
        if not path.is_file():
            raise DataError("a log of that run is gone", seen=path, fix="evaluate again, or restore the file")
    found = named or sorted(folder.glob("*.eval"))
    if not found:
        fix = f"evaluate first: trimtab eval MODEL --out {folder}"
        raise DataError("that folder holds no inspect logs (*.eval)", seen=folder, fix=fix)
    return found


def read_log(path: Path) -> EvalLog:
    """One finished log with its samples.

    Raises:
        DataError: corrupt, not trimtab's, unfinished or failed; the message says how to go on.
    """
    log = open_log(path)
    if log.status in ("started", "cancelled"):
        done = f"{path.name}: {log.results.completed_samples if log.results else 0} samples scored"
        fix = "run the same `trimtab eval ... --out` again (what is finished is kept), or `inspect eval-retry` that log"
        raise DataError("that measurement was not finished", seen=f"{done}, status {log.status!r}", fix=fix)
    if log.status != "success":
        reason = (
            log.error.message.strip().splitlines()[0] if log.error and log.error.message.strip() else "no reason given"
        )
        raise DataError("that measurement failed", seen=f"{path.name}: {reason}", fix="evaluate again")
    if AXIS_KEY not in (log.eval.metadata or {}):
        fix = "name a folder whose logs come from trimtab's tasks"
        raise DataError("that log is not one of trimtab's", seen=f"{path.name}: task {log.eval.task!r}", fix=fix)
    if not log.samples:
        raise DataError("that log holds no samples: nothing was measured", seen=path, fix="evaluate again")
    return log


def open_log(path: Path, *, header_only: bool = False) -> EvalLog:
    """A log whatever its status.

    Raises:
        DataError: where it cannot be read.
    """
    import zipfile
    import zlib

    from inspect_ai.log import read_eval_log

    try:
        return read_eval_log(str(path), header_only=header_only)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, KeyError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "delete that file and run the same evaluation again: the other axes are kept"
        raise DataError(
            "a log cannot be read: not whole, or not an inspect log", seen=f"{path}: {reason[:200]}", fix=fix
        ) from error


def run_from_logs(logs: Sequence[EvalLog]) -> Run:
    """Put the axes of several finished logs of one model together; the newest log of an axis counts.

    Raises:
        DataError: where the logs come from different models or settings.
    """
    newest: dict[str, EvalLog] = {}
    for log in sorted(logs, key=lambda log: log.eval.created):
        newest[_axis_info(log)["name"]] = log
    chosen = list(newest.values())
    prints = [fingerprint_of(log) for log in chosen]
    _check_same_model(chosen, prints)
    axes = {axis.name: axis for axis in map(axis_from_log, chosen)}
    axes |= {axis.name: axis for axis in incoherence_axes(chosen)}
    created = max(log.eval.created for log in chosen)
    texts = max(map(texts_of, chosen), key=len, default={})
    return Run(model_of(chosen[0]), axes, max(prints, key=len, default={}), created, texts)


def axis_from_log(log: EvalLog) -> Axis:
    """The axis that one log measured, items in the log's order."""
    info = _axis_info(log)
    kind = "continuous" if info.get("continuous", info["kind"] == "perplexity") else "binary"
    draws = log.eval.config.epochs or 1
    items = tuple(
        _item(sample, _marks(sample)["verdict"], _marks(sample)["value"], draws=draws) for sample in log.samples or ()
    )
    return Axis(info["name"], info["label"], kind, info["lower_is_better"], info["judge"], info["dataset"], items)  # type: ignore[arg-type]


def incoherence_axes(logs: Iterable[EvalLog]) -> list[Axis]:
    """One axis over all answers that the refusal rules judged: how often they were a loop or noise."""
    judged = [log for log in logs if _axis_info(log)["kind"] in JUDGED]
    if not judged:
        return []
    items = []
    for log in judged:
        for sample in log.samples or ():
            marks = _marks(sample)
            outcome = incoherence(marks["label"], marks["coherent"])
            items.append(_item(sample, *outcome, f"{_axis_info(log)['name']}/", log.eval.config.epochs or 1))
    infos = list(map(_axis_info, judged))
    dataset = " + ".join(dict.fromkeys(info["dataset"] for info in infos))
    return [Axis("incoherence", "Answers in loops or noise", "binary", True, infos[0]["judge"], dataset, tuple(items))]


def fingerprint_of(log: EvalLog) -> dict[str, str]:
    """The model's content hashes as the runner stored them; empty for a log that plain inspect wrote."""
    stored = (log.eval.metadata or {}).get(RUN_KEY) or {}
    return dict(stored.get("fingerprint") or {})


def texts_of(log: EvalLog) -> dict[str, str]:
    """Texts that the fingerprint holds as hashes, as the runner stored them; empty for older logs."""
    stored = (log.eval.metadata or {}).get(RUN_KEY) or {}
    return {str(key): str(text) for key, text in (stored.get("texts") or {}).items()}


def model_of(log: EvalLog) -> str:
    """The model's name as the user wrote it."""
    stored = (log.eval.metadata or {}).get(RUN_KEY) or {}
    return str(stored.get("model") or log.eval.model.removeprefix("trimtab/"))


def _axis_info(log: EvalLog) -> dict[str, Any]:
    return dict((log.eval.metadata or {})[AXIS_KEY])


def _marks(sample: EvalSample) -> dict[str, Any]:
    """The scorer's metadata; a sample that failed before it was scored is unscored, never safe."""
    score = next(iter((sample.scores or {}).values()), None)
    return (score.metadata if score else None) or {
        "verdict": "unscored",
        "value": None,
        "label": "unscored",
        "coherent": False,
    }


def _item(sample: EvalSample, verdict: str, value: float | None, prefix: str = "", draws: int = 1) -> Item:
    facts = sample.metadata or {}
    prompt = sample.input if isinstance(sample.input, str) else "\n\n".join(message.text for message in sample.input)
    wanted = str(facts.get("request") or "") or prompt  # under a jailbreak: what was really asked for
    category = str(facts.get("category") or "")
    key, group = f"{prefix}{sample.id}", ""
    if draws > 1:
        key, group = f"{key}~{sample.epoch}", key
    return Item(key, category, wanted, sample.output.completion, verdict, value, group)


def _check_same_model(logs: Sequence[EvalLog], prints: Sequence[dict[str, str]]) -> None:
    models = {model_of(log) for log in logs}
    distinct = {json.dumps(found, sort_keys=True) for found in prints if found}
    if len(models) > 1 or len(distinct) > 1:
        weights = sorted({found.get("weights", "?") for found in prints})
        seen = f"models {sorted(models)}, weights {weights}"
        fix = "use one folder for each model; a changed model needs a fresh folder"
        raise DataError("the logs in that folder come from different models or settings", seen=seen, fix=fix)


def _named_by_summary(path: Path) -> list[Path]:
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text())["trimtab"]["logs"]
        return [path.parent / Path(str(name)).name for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the summary of that run cannot be read", seen=path, fix="delete it: the logs are the record"
        ) from error
