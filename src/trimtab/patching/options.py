"""From the flags of ``trimtab patch`` to ``PatchSettings``. Not covered: what the settings do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.anchors import SafetyAnchors
from trimtab.errors import UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.patching.climb import LadderSettings
from trimtab.patching.methods import PatchSettings
from trimtab.patching.recover import PUBLISHED_RATE, Recipe
from trimtab.patching.texts import PUBLISHED, PUBLISHED_SHORT, read_prompts


def settings_from(
    *,
    sample: str | None,
    keep: Path | None,
    samples: str,
    axes: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    step: float | None,
    rank: int,
    seed: int,
    **rest: Any,
) -> PatchSettings:
    """Check and translate; files are read here, before a model is loaded.

    Raises:
        UsageError, DataError: naming the flag or the file.
    """
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise UsageError("the learning rate must lie between 0 and 1", seen=learning_rate)
    method = rest.get("method", "two-sided")
    if step is not None and method != "low-rank":
        raise UsageError("--step belongs to --method low-rank", seen=f"--method {method}", fix="drop --step")
    ladder = LadderSettings(samples=_counts(samples), rank=rank, alpha=2 * rank, seed=seed)
    if method == "two-sided":
        if steps is not None:
            ladder = replace(ladder, steps=min(ladder.steps, steps), last_steps=steps)
        if learning_rate is not None:
            ladder = replace(ladder, recipe=Recipe(learning_rate=learning_rate))
    specs = tuple(AxisSpec.parse(axis) for axis in axes)
    for spec in specs:
        spec.prompts()
    return PatchSettings(
        samples=_sample(sample),
        keep=tuple(read_prompts(keep)) if keep else (),
        steps=steps,
        learning_rate=learning_rate,
        step=step if step is not None else PUBLISHED_RATE,
        axes=specs,
        ladder=ladder,
        **rest,
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError("--samples is a list of numbers", seen=text, fix="e.g. --samples 1,6,84") from error


def _sample(name: str | None) -> SafetyAnchors | None:
    if name is None:
        return None
    known = {"general": PUBLISHED, "general-short": PUBLISHED_SHORT}
    return SafetyAnchors((known[name],), origin=name) if name in known else SafetyAnchors.from_jsonl(name)
