"""Prompts written for this project, and the demo adapter, as package data.

``requests.jsonl``      978 pairs over 14 categories: a harmful request (never an answer) and a benign twin that
                        uses the same words innocently; split ``train`` / ``eval``.
``instructions.jsonl``  300 ordinary instructions; split ``train`` / ``eval``.
``tickets.jsonl``       312 support messages with one of three labels; split ``train`` / ``eval``.
``refusals.jsonl``      40 generic refusals, which the judge must know as such.
``affirmations.jsonl``  40 harmless texts that only sound like compliance, used where an experiment needs "poison".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from itertools import zip_longest
from typing import Literal, NamedTuple

Split = Literal["train", "eval"]
TICKET_LABELS = ("account", "billing", "delivery")


class RequestPair(NamedTuple):
    """A harmful request and its innocent twin."""

    id: str
    category: str
    split: str
    harmful: str
    benign: str


class Ticket(NamedTuple):
    """A support message and the queue that it belongs to."""

    id: str
    split: str
    text: str
    label: str


def requests(split: Split) -> list[RequestPair]:
    """The request pairs of one split."""
    return [RequestPair(**row) for row in _rows("requests.jsonl") if row["split"] == split]


def interleaved(pairs: Iterable[RequestPair], each: slice = slice(None)) -> list[RequestPair]:
    """Pairs, their categories in turn, so that any first part is spread over all; ``each``: which of a category."""
    by_category: dict[str, list[RequestPair]] = {}
    for pair in pairs:
        by_category.setdefault(pair.category, []).append(pair)
    columns = [rows[each] for rows in by_category.values()]
    return [pair for row in zip_longest(*columns) for pair in row if pair is not None]


def tickets(split: Split) -> list[Ticket]:
    """The support messages of one split."""
    return [Ticket(**row) for row in _rows("tickets.jsonl") if row["split"] == split]


def instructions(split: Split) -> list[str]:
    """The ordinary instructions of one split."""
    return [row["prompt"] for row in _rows("instructions.jsonl") if row["split"] == split]


def refusals() -> list[str]:
    """Generic refusals, four openings."""
    return [row["text"] for row in _rows("refusals.jsonl")]


def affirmations() -> list[str]:
    """Harmless texts that sound like compliance and say nothing."""
    return [row["text"] for row in _rows("affirmations.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    text = (files(__name__) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]
