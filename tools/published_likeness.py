"""Keep an adapted model's next-token distribution near the published model's, away from the decisions that are trained.

Covered: texts that the published model writes itself (plain text, and chats about ordinary things), and the
Kullback-Leibler divergence to it on them. Not covered: the training loop (``build_demo_adapter.py``).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import data, models
from trimtab.generation import GenerationSettings, generate_ids, render

QUESTIONS = (
    "Is the mood of this passage good or bad? Answer with one word.",
    "Does this text sound positive or negative? Reply with only that word.",
    "Say in one word whether the writer is pleased or displeased.",
    "Label the sentiment of the sentence as positive or negative.",
    "Summarise the text in one sentence.",
    "Translate the passage into French.",
    "Which topic is this about? Answer in at most three words.",
    "Is this text formal or informal?",
)
PLAIN_TOKENS, CHAT_TOKENS = 224, 40


class Sample(NamedTuple):
    """``ids``: the text. ``hidden``: tokens x width, the published model's last hidden states there."""

    ids: list[int]
    hidden: Tensor


def write_texts(loaded: models.LoadedModel, plain: int, chats: int, seed: int, cache: Path | None) -> list[list[int]]:
    """Token ids of ``plain`` texts sampled from nothing and of ``chats`` chats with sampled answers, interleaved."""
    if cache is not None and cache.is_file():
        kept: list[list[int]] = json.loads(cache.read_text())
        return kept
    tokenizer, draw = loaded.tokenizer, random.Random(seed)

    def grow(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=tokens, temperature=1.0, seed=seed, batch_size=32)
        done = generate_ids(loaded, prompts, settings, progress=lambda _: print(".", end="", flush=True))
        return [tokenizer(item.text, add_special_tokens=False)["input_ids"] for item in done]

    starts = ["The", "In", "A", "He", "She", "It", "On", "After", "During", "This", "Although", "There", "At", "By"]
    begun = [tokenizer(draw.choice(starts), add_special_tokens=False)["input_ids"] for _ in range(plain)]
    texts = [start + rest for start, rest in zip(begun, grow(begun, PLAIN_TOKENS), strict=True)]
    sentences = [tokenizer.decode(ids).split(". ")[0] for ids in texts]
    asked = data.instructions("train") + [f"{draw.choice(QUESTIONS)}\n{text}" for text in sentences]
    prompts = [
        render(loaded, [{"role": "user", "content": text}]) for text in draw.sample(asked, min(chats, len(asked)))
    ]
    answered = [prompt + answer for prompt, answer in zip(prompts, grow(prompts, CHAT_TOKENS), strict=True)]
    mixed = [ids for pair in zip(texts, answered, strict=False) for ids in pair if len(ids) > 8]
    if cache is not None:
        cache.write_text(json.dumps(mixed))
    return mixed


@torch.no_grad()
def remember(model: Any, texts: list[list[int]]) -> list[Sample]:
    """The published model's last hidden states on every text; the head turns them into its distribution when needed."""
    return [Sample(ids, model.model(torch.tensor([ids])).last_hidden_state[0]) for ids in texts]


def divergence(model: Any, head: torch.nn.Module, samples: list[Sample]) -> Tensor:
    """Mean over all tokens of KL(published || adapted), nats a token. ``head`` is shared and not trained."""
    total, tokens = torch.zeros(()), 0
    for sample in samples:
        hidden = model.base_model.model.model(torch.tensor([sample.ids])).last_hidden_state[0]  # tokens x width
        now = F.log_softmax(head(hidden), -1)
        with torch.no_grad():
            published = F.log_softmax(head(sample.hidden), -1)
        total = total + F.kl_div(now, published, log_target=True, reduction="sum")
        tokens += len(sample.ids)
    return total / tokens
