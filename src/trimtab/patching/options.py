"""From the flags of ``trimtab patch`` to ``PatchSettings``. Not covered: what the settings do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.anchors import SafetyAnchors
from trimtab.errors import UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.patching.climb import LadderSettings
from trimtab.patching.lowrank import PUBLISHED_RANK
from trimtab.patching.methods import PatchSettings
from trimtab.patching.recover import PUBLISHED_RATE, Recipe
from trimtab.patching.texts import BUILT_IN, read_prompts


def settings_from(
    *,
    sample: str | None,
    keep: Path | None,
    samples: str | None,
    axes: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    step: float | None,
    rank: int | None,
    seed: int,
    **rest: Any,
) -> PatchSettings:
    """Check and translate; files are read here, before a model is loaded.

    Raises:
        UsageError, DataError: naming the flag or the file.
    """
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise UsageError("the learning rate must lie between 0 and 1", seen=learning_rate, fix="for instance 2e-5")
    method = rest.get("method", "two-sided")
    given = {"--steps": steps, "--learning-rate": learning_rate, "--step": step, "--samples": samples, "--keep": keep,
             "--rank": rank}  # fmt: skip
    _require_read(
        {flag for flag, value in given.items() if value is not None},
        method=method,
        full=rest.get("full", False),
        selecting=rest.get("select", "general") != "general",
    )
    ladder = LadderSettings(seed=seed)
    if samples is not None:
        ladder = replace(ladder, samples=_counts(samples))
    if rank is not None and method != "low-rank":
        ladder = replace(ladder, rank=rank, alpha=2 * rank)
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
        rank=rank if rank is not None and method == "low-rank" else PUBLISHED_RANK,
        axes=specs,
        ladder=ladder,
        **rest,
    )


def _require_read(flags: set[str], *, method: str, full: bool, selecting: bool) -> None:
    """Raise where a flag that was given would not be read.

    Raises:
        UsageError: naming the flag and where it belongs.
    """
    homes = {
        "--step": ("--method low-rank", method == "low-rank"),
        "--steps": ("--method two-sided or published", method != "low-rank"),
        "--learning-rate": ("--method two-sided or published", method != "low-rank"),
        "--samples": ("--method two-sided", method == "two-sided"),
        "--keep": ("--method two-sided or a selection", method == "two-sided" or selecting),
        "--rank": ("an adapter", not full),
    }
    for flag, (home, read) in homes.items():
        if flag in flags and not read:
            seen = f"--method {method}{' --full' if full else ''}"
            raise UsageError(f"{flag} belongs to {home}", seen=seen, fix=f"drop {flag}")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError("--samples is a list of numbers", seen=text, fix="e.g. --samples 1,6,84") from error


def _sample(name: str | None) -> SafetyAnchors | None:
    if name is None:
        return None
    return SafetyAnchors((BUILT_IN[name],), origin=name) if name in BUILT_IN else SafetyAnchors.from_jsonl(name)
