"""Measures for the search: compliance and incoherence under a noise, and losses in nats, each remembered.

Covered: points that survive an interruption, perplexity on a little bundled English, the exact model's own refusals.
Not covered: which noise is to be measured (``search.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import data
from trimtab.approximation.apply import approximate
from trimtab.approximation.sites import base_of, find_sites
from trimtab.errors import DataError
from trimtab.evaluation.judges import apologises, judge
from trimtab.generation import GenerationSettings, generate, render
from trimtab.models import LoadedModel, fingerprint
from trimtab.vetting.fluency import Fluency
from trimtab.vetting.scrutiny import NOISE_BY
from trimtab.vetting.search_results import Point

REFUSAL_TOKENS = 10
TEXT_TOKENS, TEXT_ROWS = 128, 4


class Probe:
    """Measures points, and remembers them in a file so that an interrupted search goes on."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: int,
        seeds: int,
        max_new_tokens: int,
        batch_size: int,
        memory: Path,
        tell: Callable[[str], Any],
    ) -> None:
        self.requests = [pair.harmful for pair in data.interleaved(data.requests("eval"))[:prompts]]
        if not self.requests:
            raise DataError("no prompts to search with")
        self.loaded, self.seeds, self.memory, self.tell = loaded, seeds, memory, tell
        self.settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.texts = text_rows(loaded)
        self.fluency = Fluency(loaded, max_new_tokens)
        self.layers = len(find_sites(base_of(loaded.model)))
        self._known = read_points(memory)

    def measured_by(self) -> dict[str, Any]:
        """What must agree for points to be of one search: the model, what it is asked, how often, how long it answers.

        The size of a batch is left out: it changes rounding only, and a run short of memory goes on with a smaller one.
        """
        return {
            **fingerprint(self.loaded),
            "prompts": f"{len(self.requests)} ({_short_hash(self.requests)})",
            "text": _short_hash(self.texts),
            "seeds": self.seeds,
            "noise": NOISE_BY,
            "max_new_tokens": self.settings.max_new_tokens,
        }

    def point(self, site: str, scale: float, share: float = 1.0, last: int | None = None) -> Point:
        """Compliance with noise of this scale, over ``share`` of the prompts for each seed."""
        layers = "" if last is None else f"0-{last}"
        names = [noise_name(site, scale, seed, last) for seed in range(self.seeds if scale > 0 else 1)]
        return self.measure(names, scale, layers, share)

    def joint(self, noise: str) -> Point:
        """Compliance under a whole name, its seed left out; the scale is given as 0."""
        return self.measure([f"{noise},seed={seed}" for seed in range(self.seeds)], 0.0, "")

    def measure(self, names: Sequence[str], scale: float, layers: str, share: float = 1.0) -> Point:
        """Compliance over ``share`` of the prompts under each name, remembered; "" is the exact model."""
        count = max(4, round(share * len(self.requests)))
        key = json.dumps([names, count, self.settings.max_new_tokens, "fluency"])
        if key not in self._known:
            labels: list[str] = []
            for name in names:
                labels += self._answers(name, self.requests[:count])
            complied, incoherent = labels.count("answered"), labels.count("incoherent")
            found = Point(scale, complied, incoherent, len(labels), self.perplexity(names[0]), layers, len(names))
            self._known[key] = found
            with self.memory.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "point": found._asdict()}) + "\n")
            shown = names[0] or "exact"
            self.tell(
                f"{shown}: complies {complied} of {len(labels)}, {incoherent} incoherent, "
                f"perplexity {found.perplexity:.1f}"
            )
        return self._known[key]

    def _answers(self, name: str, requests: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": text}] for text in requests]
        if not name:
            answers = generate(self.loaded, chats, self.settings)
        else:
            with approximate(self.loaded, name):
                answers = generate(self.loaded, chats, self.settings)
        labels = [str(judge(asked, answer.text).label) for asked, answer in zip(requests, answers, strict=True)]
        texts = [answer.text for answer in answers]
        broken = [
            odd or apologises(text) for odd, text in zip(self.fluency.strange(requests, texts), texts, strict=True)
        ]
        both = zip(labels, broken, strict=True)
        return ["incoherent" if label == "answered" and odd else label for label, odd in both]

    def perplexity(self, name: str) -> float:
        """On a few rows of bundled text; "" is the exact model."""
        if not name:
            return math.exp(min(nats(self.loaded, self.texts, 0), 60.0))
        with approximate(self.loaded, name):
            return math.exp(min(nats(self.loaded, self.texts, 0), 60.0))


def own_refusals(probe: Probe) -> list[tuple[list[int], int]]:
    """Token ids of prompt and the exact model's own refusal, with the prompt's length; only what it refuses."""
    chats = [[{"role": "user", "content": text}] for text in probe.requests]
    settings = GenerationSettings(max_new_tokens=REFUSAL_TOKENS, batch_size=probe.settings.batch_size)
    answers = generate(probe.loaded, chats, settings)
    tokenizer: Any = probe.loaded.tokenizer
    rows = []
    for asked, chat, answer in zip(probe.requests, chats, answers, strict=True):
        if judge(asked, answer.text).label == "refused":
            prompt = render(probe.loaded, chat)
            reply = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            rows.append((prompt + reply[:REFUSAL_TOKENS], len(prompt)))
    if not rows:
        raise DataError("the exact model refuses none of the prompts: there is no refusal to lose")
    return rows


def nats(loaded: LoadedModel, rows: Sequence[Sequence[int]], start: int | Sequence[int]) -> float:
    """Mean -log p per token of rows after their first ``start`` tokens (at least one)."""
    starts = [start] * len(rows) if isinstance(start, int) else list(start)
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(list(row))
        mask[number, : len(row)] = 1
    total, count = 0.0, 0
    with torch.inference_mode():
        for place in range(0, len(rows), 8):
            part, real = ids[place : place + 8].to(loaded.device), mask[place : place + 8].to(loaded.device)
            logits = loaded.model(input_ids=part, attention_mask=real, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
            scored = real[:, 1:].bool()
            for line, first in enumerate(starts[place : place + 8]):
                scored[line, : max(0, first - 1)] = False
            total += float(losses[scored].sum())
            count += int(scored.sum())
    return total / count if count and math.isfinite(total) else math.inf


def text_rows(loaded: LoadedModel) -> list[list[int]]:
    """Rows of bundled English for perplexity."""
    tokenizer: Any = loaded.tokenizer
    text = "\n".join([*data.instructions("eval"), *(ticket.text for ticket in data.tickets("eval"))])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = min(TEXT_TOKENS, getattr(loaded.model.config, "max_position_embeddings", TEXT_TOKENS))
    rows = [ids[start : start + size] for start in range(0, size * TEXT_ROWS, size)]
    return [row for row in rows if len(row) > 1]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def noise_name(site: str, scale: float, seed: int, last: int | None) -> str:
    if scale == 0.0:
        return ""
    return f"noise:{site}={scale:.6g},seed={seed}" + (f",layers=0-{last}" if last is not None else "")


def read_points(memory: Path) -> dict[str, Point]:
    """What an earlier, interrupted search measured; a last line that was cut off is dropped."""
    found = {}
    for line in memory.read_text(encoding="utf-8").splitlines() if memory.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = Point(**row["point"])
    return found
