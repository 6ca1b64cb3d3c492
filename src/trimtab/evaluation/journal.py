"""What a run has already got, kept line by line while it goes on, so that a killed run loses only what was in flight.

Covered: answers of the model and verdicts of judges by a hash of what was asked; a torn last line.
Not covered: finished axes (their logs are the record); the journal is removed once a run is complete.

Only hashes of prompts are written, with the answers. Under greedy decoding a resumed run gives the texts that it would
have given, but for the effects of padding in another batch.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.evaluation.judges import Verdict
from trimtab.evaluation.labelled import Exchange
from trimtab.evaluation.ladder import Awaited
from trimtab.generation import Generation, GenerationSettings, Message


class Journal:
    """Values by key in a file of JSON lines; a line that was not written whole is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self._lock = threading.Lock()  # answers come from the model's thread, verdicts from the event loop
        self.reused = 0
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.split("\n"):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.values[str(key)] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._stream.write("\n")  # close the torn line, so that the next one is whole

    def get(self, key: str) -> Any | None:
        """The value under a key, or None."""
        found = self.values.get(key)
        self.reused += found is not None
        return found

    def put(self, key: str, value: Any) -> None:
        """Write a value at once; the operating system has it when this returns."""
        line = json.dumps([key, value]) + "\n"
        with self._lock:
            self.values[key] = value
            self._stream.write(line)
            self._stream.flush()

    def close(self, *, complete: bool) -> None:
        """Close; remove the file where nothing is left to resume."""
        self._stream.close()
        if complete:
            self.path.unlink(missing_ok=True)


def answer_key(chat: Sequence[Message], settings: GenerationSettings) -> str:
    """Hash of a chat and of how it is answered; the batch size does not matter."""
    facts = [list(chat), settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:32]


def to_row(found: Generation) -> list[Any]:
    """A generation as JSON."""
    return [found.text, found.tokens, found.prompt_tokens, found.truncated]


def from_row(row: list[Any]) -> Generation:
    """A generation from its JSON."""
    return Generation(*row)


class Remembered:
    """A judge whose verdicts are kept in a journal."""

    def __init__(self, judge: Awaited, journal: Journal) -> None:
        self.judge, self.journal = judge, journal
        self.name, self.positive = judge.name, judge.positive

    async def verdict(self, exchange: Exchange) -> Verdict:
        """From the journal where it is there."""
        facts = json.dumps([self.name, exchange.prompt, exchange.answer])
        key = "v" + hashlib.sha256(facts.encode("utf-8", "replace")).hexdigest()[:32]
        kept = self.journal.get(key)
        if kept is not None:
            return Verdict(*kept)
        found = await self.judge.verdict(exchange)
        self.journal.put(key, list(found))
        return found
