"""What a repair was made with, for its card and its record: enough to make it again.

Covered: seed, rank, rate, system message, aligned model, all settings. Not covered: what came of it (``job.py``).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trimtab.patching.methods import PatchSettings
from trimtab.patching.recover import LORA_RATE, PUBLISHED_RATE


def recipe(settings: PatchSettings) -> dict[str, Any]:
    """Seed, rank (None: all parameters), learning rate (None: the method's own steps), system message, ``aligned``,
    and every setting. A user's samples and prompts to keep are counted, not written: they may be private."""
    plain = asdict(settings)
    samples = settings.samples
    plain["samples"] = None if samples is None else {"origin": samples.origin, "count": len(samples.anchors)}
    plain["keep"] = len(settings.keep)
    return {
        "seed": settings.ladder.seed,
        "rank": _rank(settings),
        "learning_rate": _rate(settings),
        "system": settings.system,
        "aligned": settings.aligned,
        "settings": plain,
    }


def recipe_lines(settings: PatchSettings) -> list[str]:
    """The same for a person, without the settings that few change."""
    rank, rate = _rank(settings), _rate(settings)
    system = "the chat template's own" if settings.system is None else repr(settings.system)
    return [
        f"seed: {settings.ladder.seed}; rank of the adapter: {'none, all parameters' if rank is None else rank}; "
        f"learning rate: {'none was set' if rate is None else f'{rate:g}'}",
        f"system message of the samples: {system}",
        f"aligned model: {settings.aligned}",
    ]


def _rank(settings: PatchSettings) -> int | None:
    if settings.full:
        return None
    return settings.rank if settings.method == "low-rank" else settings.ladder.rank


def _rate(settings: PatchSettings) -> float | None:
    if settings.method == "two-sided":
        return settings.ladder.recipe.learning_rate
    if settings.method == "low-rank":
        return None  # one step, whose length is among the settings
    return settings.learning_rate or (PUBLISHED_RATE if settings.full else LORA_RATE)
