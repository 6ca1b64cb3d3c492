"""Continuous batching: a row that ends gives its place to the next prompt, so that no pass computes finished rows.

Covered: greedy decoding, sampling with temperature and top-p from a seed of each prompt's own (an answer
does not depend on its company), prompts that come while others are answered, early return of every answer.
Not covered: logits processors, beam search, sliding-window and recurrent caches: ``supports`` says no, and
``generation.py`` calls the model's own ``generate``.

Source: iteration-level scheduling as in Orca (Yu et al., OSDI 2022), on one dense cache instead of pages.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab import prefix
from trimtab.generation import Prompt
from trimtab.precision import without_graph
from trimtab.slots import Reader, Slots

REFILL = 8  # reading new prompts costs about as much as a step: done once an eighth of the slots is free
HARMLESS = {  # settings of a checkpoint that decoding here honours or does not need
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "use_cache", "transformers_version", "cache_implementation"),
    *(
        "output_attentions",
        "output_hidden_states",
        "return_dict_in_generate",
        "num_return_sequences",
        "_from_model_config",
    ),
}


class Limits(NamedTuple):
    """``rows``: most prompts in one pass; ``tokens``: most new tokens of an answer. ``temperature`` 0 is greedy."""

    rows: int
    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


Take = Callable[[int], Sequence[Prompt]]
Done = Callable[[Prompt, list[int], bool], None]


@dataclass
class _Row:
    prompt: Prompt
    random: torch.Generator | None
    new: list[int] = field(default_factory=list)


def supports(model: Any) -> bool:
    """Whether ``decode`` equals this model's own ``generate``: a plain cache, no logits processor in its settings."""
    return prefix.grows_plainly(model) and not set(model.generation_config.to_diff_dict()) - HARMLESS


def decode(model: Any, tokenizer: Any, take: Take, done: Done, limits: Limits) -> None:
    """Answer prompts until there are no more.

    Args:
        model: a causal model that ``supports`` accepts.
        tokenizer: its tokenizer; an answer ends at its end or padding token, or at one of the model's own.
        take: called with the number of free rows between steps; gives at most so many prompts, none if none wait.
            Decoding ends when it gives none and no row is left.
        done: called with the prompt, the new ids without the end token, and whether the limit cut them.
        limits: how to decode.
    """
    state = _Decoder(model, tokenizer, done, limits)
    with without_graph(model):
        while True:
            free = limits.rows - len(state.rows)
            if free * REFILL >= limits.rows and (prompts := list(take(free))):
                state.admit(prompts)
                continue  # rows may have ended at their first token
            if not state.rows:
                return
            state.step()


class _Decoder:
    """``rows``: what each slot in use answers."""

    def __init__(self, model: Any, tokenizer: Any, done: Done, limits: Limits) -> None:
        self.limits, self.done = limits, done
        self.ends = _end_tokens(model, tokenizer)
        self.reader, self.slots = Reader(model, tokenizer.pad_token_id), Slots(model)
        self.rows: dict[int, _Row] = {}
        self.device = model.device
        self.seen: Counter[tuple[int, ...]] = Counter()

    def admit(self, prompts: Sequence[Prompt]) -> None:
        """Read prompts into free slots and choose their first tokens."""
        reading = self.reader.read([prompt.ids for prompt in prompts])
        if not self.rows:
            self.slots.start(reading)
            places = list(range(len(prompts)))
        else:
            places = self._make_room(len(prompts))
            self.slots.put(reading, places)
        self.rows |= {place: _Row(prompt, self._random(prompt)) for place, prompt in zip(places, prompts, strict=True)}
        self._append(reading.logits, places)

    def step(self) -> None:
        """One more token in every row."""
        places = list(self.rows)
        if len(places) * REFILL <= self.slots.count * (REFILL - 1):  # nobody waits: finished rows are dropped
            self._keep(places, len(places))
            places = list(self.rows)
        tokens = torch.zeros(self.slots.count, dtype=torch.long)
        positions = torch.zeros(self.slots.count, dtype=torch.long)
        for place, row in self.rows.items():
            tokens[place], positions[place] = row.new[-1], len(row.prompt.ids) + len(row.new) - 1
        logits = self.slots.step(tokens.to(self.device), positions.to(self.device))
        self._append(logits[places], places)

    def _make_room(self, count: int) -> list[int]:
        """Free slots for so many prompts; columns that nobody looks at any more are dropped on the way."""
        used = list(self.rows)
        free = [place for place in range(self.slots.count) if place not in self.rows]
        stale = self.slots.unseen(used) * 4 > self.slots.mask.shape[1]
        if len(free) < count or stale:
            self._keep(used, len(used) + count)
            free = list(range(len(used), len(used) + count))
        return free[:count]

    def _keep(self, places: list[int], slots: int) -> None:
        self.slots.rearrange(places, slots)
        self.rows = {place: self.rows[old] for place, old in enumerate(places)}

    def _append(self, logits: Tensor, places: list[int]) -> None:
        """Choose a token for each of these rows (logits: rows x vocabulary) and let go of the rows that end."""
        chosen = choose(logits, [self.rows[place].random for place in places], self.limits)
        for place, token in zip(places, chosen, strict=True):
            row = self.rows[place]
            ended = token in self.ends
            if not ended:
                row.new.append(token)
            if ended or len(row.new) == self.limits.tokens:
                del self.rows[place]
                self.done(row.prompt, row.new, not ended)

    def _random(self, prompt: Prompt) -> torch.Generator | None:
        """A generator from the seed, the prompt, and how often the same prompt came before."""
        if self.limits.temperature == 0:
            return None
        times = self.seen[tuple(prompt.ids)]
        self.seen[tuple(prompt.ids)] += 1
        text = f"{self.limits.seed}|{times}|{prompt.ids}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def choose(logits: Tensor, randoms: Sequence[torch.Generator | None], limits: Limits) -> list[int]:
    """The next token of each row: the likeliest, or a draw from the smallest set of tokens that holds ``top_p``.

    Args:
        logits: rows x vocabulary.
        randoms: each row's generator; unused at temperature 0.
        limits: temperature and top-p (nucleus sampling, Holtzman et al. 2020).
    """
    if limits.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    draws = torch.stack([torch.rand((), generator=random, dtype=torch.float64) for random in randoms])
    chances, order = (logits.double() / limits.temperature).softmax(-1).sort(dim=-1, descending=True)
    before = chances.cumsum(-1) - chances
    chances = torch.where(before < limits.top_p, chances, 0.0)  # the first token always stays
    reached = chances.cumsum(-1)
    places = torch.searchsorted(reached, draws.to(reached.device)[:, None] * reached[:, -1:], right=True)
    last = (chances > 0).sum(-1, keepdim=True) - 1
    drawn: list[int] = order.gather(1, places.minimum(last)).squeeze(1).tolist()
    return drawn


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    stated = model.generation_config.eos_token_id
    own = stated if isinstance(stated, list) else [stated]
    return {token for token in (*own, tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None}
