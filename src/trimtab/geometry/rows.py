"""Task rows as token ids for geometry: prompt and supervised completion, through the model's own chat template.

Covered: JSONL, or one JSON array, in TRL's forms ``prompt`` + ``completion`` and ``messages`` (conversational or plain
text), the bundled routing task. Not covered: everything that a trainer's data pipeline adds (packing, masks of other
kinds).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab import data
from trimtab.errors import DataError
from trimtab.generation import render
from trimtab.models import LoadedModel
from trimtab.tuning.pools import TokenisedAnchor, turn_end

LONGEST = 256  # tokens of a row; longer prompts are cut on the left


def bundled_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The routing task: a benign task whose answers are one word."""
    from trimtab.evaluation.datasets import ticket_system

    system = {"role": "system", "content": ticket_system(sorted(data.TICKET_LABELS))}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": ticket.text}],
            "completion": [{"role": "assistant", "content": ticket.label}],
        }
        for ticket in data.tickets("train")
    ]
    random.Random(seed).shuffle(rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of one JSON array.

    Raises:
        DataError: naming the line.
    """
    from trimtab.tuning import training_data

    return training_data.read_rows(path, "--data")


def tokenise_rows(loaded: LoadedModel, rows: Sequence[dict[str, Any]]) -> list[TokenisedAnchor]:
    """Ids of prompt and completion; the end of turn is supervised.

    Raises:
        DataError: for a row without a completion.
    """
    found = [_tokenise(loaded, row, number) for number, row in enumerate(rows, 1)]
    if not found:
        raise DataError("no task rows", fix="give a JSONL file with at least one row")
    return found


def _tokenise(loaded: LoadedModel, row: dict[str, Any], number: int) -> TokenisedAnchor:
    if "messages" in row:
        prompt, answer = row["messages"][:-1], row["messages"][-1]["content"]
    elif "completion" in row:
        completion = row["completion"]
        prompt, answer = row["prompt"], completion if isinstance(completion, str) else completion[-1]["content"]
    else:
        raise DataError(
            f"row {number} has no completion to take a gradient of", seen=sorted(row), fix="use prompt + completion"
        )
    if isinstance(prompt, str):
        ids: list[int] = loaded.tokenizer(prompt)["input_ids"]
        end = loaded.tokenizer.eos_token_id
    else:
        ids, end = render(loaded, prompt), turn_end(loaded)
    reply: list[int] = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
    reply = [*reply, end][:LONGEST]
    return TokenisedAnchor(prompt=ids[-LONGEST:], reply=reply)
