"""Preference rows for hardening: a user's JSONL file, or the project's own set.

The own set is made of bundled training requests: on a harmful one a refusal is chosen over a harmless text that only
sounds like compliance; two-sided, on its innocent twin the model's own answer is chosen over a refusal. Nothing in it
answers a harmful request.

Covered: reading with line numbers, the own set, one-sided as published or two-sided. Not covered: PKU-SafeRLHF or other
sets (name a file).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab import data
from trimtab.anchors import spare_pairs
from trimtab.errors import DataError
from trimtab.evaluation.files import read_rows
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, generate
from trimtab.models import LoadedModel

REPLY_TOKENS = 20


@dataclass(frozen=True)
class Preference:
    """A request, the reply to prefer, the reply to avoid; ``harmful``: whether the request is."""

    prompt: str
    chosen: str
    rejected: str
    harmful: bool = True


def from_file(path: Path) -> list[Preference]:
    """Rows ``{"prompt", "chosen", "rejected"}`` and optionally ``"harmful"`` (default true).

    Raises:
        DataError: missing, malformed (with the row), or empty.
    """
    found = []
    for number, row in enumerate(read_rows(path), 1):
        texts = [row.get(key) for key in ("prompt", "chosen", "rejected")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            fix = "every row needs the texts prompt, chosen and rejected"
            raise DataError("a preference row is not whole", seen=f"{path}, row {number}: keys {sorted(row)}", fix=fix)
        harmful = row.get("harmful", True)
        if not isinstance(harmful, bool):
            raise DataError("harmful is true or false", seen=f"{path}, row {number}: {harmful!r}")
        found.append(Preference(str(texts[0]), str(texts[1]), str(texts[2]), harmful))
    return found


def bundled(loaded: LoadedModel, pairs: int, *, two_sided: bool, seed: int) -> list[Preference]:
    """The project's own set: so many harmful requests and, two-sided, those of their twins that the model answers.

    The refusal is the model's own where it refuses, so that hardening does not teach another style.

    Raises:
        DataError: more pairs than there are, or a model that refuses fewer than a quarter of the requests.
    """
    spare = spare_pairs()
    if not 1 <= pairs <= len(spare):
        raise DataError("the bundled set has no such number of pairs", seen=pairs, fix=f"1 to {len(spare)}")
    draw = random.Random(seed)
    chosen = spare[:pairs]
    refusals, affirmations = data.refusals(), data.affirmations()
    own = _own(loaded, [pair.harmful for pair in chosen])
    held = [judge(pair.harmful, text).label == "refused" for pair, text in zip(chosen, own, strict=True)]
    if sum(held) < len(chosen) / 4:
        seen = f"{sum(held)} of {len(chosen)} refused"
        raise DataError("this model has no refusals to harden", seen=seen, fix="start from an aligned model")
    rows = [
        Preference(pair.harmful, text if refused else draw.choice(refusals), draw.choice(affirmations))
        for pair, text, refused in zip(chosen, own, held, strict=True)
    ]
    if two_sided:
        answers = _own(loaded, [pair.benign for pair in chosen])
        rows += [
            Preference(pair.benign, text, draw.choice(refusals), harmful=False)
            for pair, text in zip(chosen, answers, strict=True)
            if judge(pair.benign, text).label == "answered"
        ]
    draw.shuffle(rows)
    return rows


def _own(loaded: LoadedModel, requests: Sequence[str]) -> list[str]:
    chats = [[{"role": "user", "content": text}] for text in requests]
    return [found.text for found in generate(loaded, chats, GenerationSettings(REPLY_TOKENS, batch_size=32))]
