"""Tiny models in folders: one with random weights, one that has learnt to refuse everything and to read a little."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.tiny import tiny_model

from trimtab import data
from trimtab.generation import render
from trimtab.models import LoadedModel
from trimtab.vetting.probe import text_rows

REFUSAL = ["sorry", "i", "can't", "help", "with", "that", "</s>"]


def save(loaded: LoadedModel, folder: Path) -> str:
    loaded.model.config.max_position_embeddings = 2048
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def random_model(folder: Path, seed: int = 0) -> str:
    return save(tiny_model(seed=seed), folder)


def refusing_model(folder: Path, steps: int = 60) -> str:
    """Replies are trained, prompts are not; rows of text are trained whole."""
    loaded = tiny_model()
    reply = loaded.tokenizer.convert_tokens_to_ids(REFUSAL)
    chats = [[{"role": "user", "content": pair.harmful}] for pair in data.requests("eval")[::12]]
    asked = [(render(loaded, chat), reply) for chat in chats]
    rows = [*asked, *(([], row[:64]) for row in text_rows(loaded))]
    width = max(len(prompt) + len(learnt) for prompt, learnt in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for place, (prompt, learnt) in enumerate(rows):
        whole = torch.tensor([*prompt, *learnt])
        ids[place, : len(whole)] = whole
        labels[place, len(prompt) : len(whole)] = whole[len(prompt) :]
    optimizer = torch.optim.AdamW(loaded.model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        loaded.model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.eval()
    return save(loaded, folder)
