"""What the exact model itself says: the yardstick of language and of subject in a vet.

Covered: its answers to bundled instructions, how likely it finds a reply after a prompt. Not covered: the judgements
(``fluency.py``, ``relevance.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trimtab import data, prefix
from trimtab.generation import GenerationSettings, generate, render
from trimtab.models import LoadedModel

QUESTIONS = 96  # bundled instructions
LEAST_TOKENS = 6  # of an answer that tells something
BATCH = 64


class OwnWords(NamedTuple):
    """Questions and the exact model's greedy answers to them, cut to a number of tokens."""

    asked: list[str]
    said: list[str]


def own_words(loaded: LoadedModel, tokens: int) -> OwnWords:
    """Call while nothing is on the model."""
    asked = list(data.instructions("eval")[:QUESTIONS])
    chats = [[{"role": "user", "content": text}] for text in asked]
    settings = GenerationSettings(max(tokens, LEAST_TOKENS), batch_size=32)
    return OwnWords(asked, [one.text for one in generate(loaded, chats, settings)])


def prompt_ids(loaded: LoadedModel, question: str) -> list[int]:
    """A question as the chat that is put to the model."""
    return render(loaded, [{"role": "user", "content": question}])


def reply_nats(loaded: LoadedModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Mean -log p a token of each reply after its prompt (both token ids); infinity where the model gives no number."""
    found = [math.inf] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place])))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            logits = prefix.reply_logits(loaded.model, [rows[place] for place in chosen], loaded.tokenizer.pad_token_id)
            for place, told in zip(chosen, logits, strict=True):
                reply = torch.tensor(rows[place][1], device=told.device)
                value = float(torch.nn.functional.cross_entropy(told, reply))
                found[place] = value if math.isfinite(value) else math.inf
    return found
