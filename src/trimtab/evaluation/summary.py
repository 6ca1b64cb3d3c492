"""``results.json``: one run in the shape that lm-evaluation-harness writes, so that its readers work on ours.

Covered: rates or means with standard errors, sample counts, direction, fingerprint, the names of the logs.
Not covered: reading (``logs.py``): the logs are the record, this file is for other tools.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.comparison.records import Axis, Run
from trimtab.evaluation.logs import SUMMARY


def write_summary(run: Run, folder: Path, logs: Sequence[Path]) -> Path:
    """Write the file; its path."""
    path = folder / SUMMARY
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(summary(run, logs), indent=2, sort_keys=True) + "\n")
    partial.replace(path)  # a reader, or a full disk, never sees half of it
    return path


def summary(run: Run, logs: Sequence[Path]) -> dict[str, Any]:
    """The document: ``results[task]["rate,none"]`` (``nats,none`` for perplexity) and the standard error beside it."""
    axes = run.axes.values()
    return {
        "results": {axis.name: _numbers(axis) for axis in axes},
        "higher_is_better": {axis.name: {_metric(axis): not axis.lower_is_better} for axis in axes},
        "n-samples": {axis.name: {"original": len(axis.items), "effective": _scored(axis)} for axis in axes},
        "versions": {axis.name: axis.judge for axis in axes},
        "configs": {axis.name: {"task": axis.name, "dataset_path": axis.dataset} for axis in axes},
        "config": {"model": "trimtab", "model_args": run.model},
        "model_name": run.model,
        "date": run.created,
        "trimtab": {"fingerprint": run.fingerprint, "logs": [path.name for path in logs]},
    }


def _numbers(axis: Axis) -> dict[str, Any]:
    values = [item.value for item in axis.items if item.value is not None]
    name = _metric(axis)
    if not values:
        return {"alias": axis.label, f"{name},none": None, f"{name}_stderr,none": None, "unscored,none": 1.0}
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    unscored = 1 - len(values) / len(axis.items)
    return {
        "alias": axis.label,
        f"{name},none": statistics.fmean(values),
        f"{name}_stderr,none": spread,
        "unscored,none": unscored,
    }


def _metric(axis: Axis) -> str:
    return {"accuracy": "acc", "perplexity": "nats_per_token", "structeval": "score"}.get(
        axis.name.partition(":")[0], "rate"
    )


def _scored(axis: Axis) -> int:
    return sum(item.value is not None for item in axis.items)
