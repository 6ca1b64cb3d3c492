"""Anchors as token ids: the loss of the aligned model's own words, for a few of them at a time.

Covered: rendering with the model's chat template, the decision tokens, per-anchor losses, references, rotation.
Not covered: who writes the replies (``distill.py``) and what follows from a loss (``rules.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import prefix
from trimtab.anchors import SIDES, Anchor, SafetyAnchors, Side
from trimtab.errors import GuardError
from trimtab.four_bits import keep_order
from trimtab.generation import render
from trimtab.models import LoadedModel, require_chat_template
from trimtab.precision import at_least_float32
from trimtab.prefix import PrefixedBatch
from trimtab.tuning.likely import Likely, divergences, joined, likely_of


class TokenisedAnchor(NamedTuple):
    """``prompt``: ids of the rendered request; ``reply``: ids of the supervised part of the reply."""

    prompt: list[int]
    reply: list[int]


@dataclass(frozen=True)
class AnchorBatch:
    """``tokens``: what is fed, aligned on the right. ``labels``: rows x reply width, -100 where unused."""

    tokens: PrefixedBatch
    labels: Tensor

    def losses(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy over each anchor's supervised tokens, one value a row (nats); differentiable.

        Only the positions that predict a supervised token go through the output layer.
        """
        token = F.cross_entropy(self.logits(model).transpose(1, 2), self.labels, ignore_index=-100, reduction="none")
        return token.sum(1) / self.used.sum(1)

    def logits(self, model: nn.Module) -> Tensor:
        """Predictions of the supervised tokens, rows x reply width x vocabulary, float32 at least; differentiable."""
        logits: Tensor = prefix.read(model, self.tokens, logits_to_keep=self.labels.shape[1]).logits
        return at_least_float32(logits)

    @property
    def used(self) -> Tensor:
        """Where there is a supervised token; rows x reply width."""
        return self.labels != -100


class AnchorPool:
    """The anchors of one side, with the loss that each had in the aligned model and a cursor that rotates over them."""

    def __init__(self, side: Side, rows: Sequence[TokenisedAnchor]) -> None:
        if not rows:
            raise GuardError(
                f"the pool of anchors to {side} is empty", fix="add anchors of that side, or hold one side only"
            )
        self.side = side
        self.rows = list(rows)
        self.reference: Tensor | None = None  # (anchors,) nats, on the CPU
        self.likely: Likely | None = None  # of the aligned model, where the rule asks for it, on the CPU
        self.cursor = 0

    def __len__(self) -> int:
        return len(self.rows)

    def references(self, indices: Sequence[int]) -> Tensor:
        """What these anchors cost in the aligned model; (indices,) nats.

        Raises:
            GuardError: when they were never measured.
        """
        if self.reference is None:
            raise GuardError("the anchors have no reference losses", fix="let the guard prepare before training")
        return self.reference[list(indices)]

    def likeliest(self, indices: Sequence[int]) -> Likely:
        """What the aligned model would say at these anchors' supervised tokens.

        Raises:
            GuardError: when it was never measured.
        """
        if self.likely is None:
            raise GuardError(
                "the aligned model's distribution is not known", fix="let the guard prepare before training"
            )
        return self.likely.of(indices, max(len(self.rows[index].reply) for index in indices))

    def next_rows(self, count: int) -> list[TokenisedAnchor]:
        """The next ``count`` anchors in rotation."""
        return [self.rows[index] for index in self.next_indices(count)]

    def next_indices(self, count: int) -> list[int]:
        """The next ``count`` anchors in rotation (all of them where the pool is smaller)."""
        count = min(count, len(self.rows))
        indices = [(self.cursor + offset) % len(self.rows) for offset in range(count)]
        self.cursor = (self.cursor + count) % len(self.rows)
        return indices


@dataclass(frozen=True)
class AnchorReader:
    """Turns anchors into batches for one model. ``share``: read what all rows have in common only once."""

    model: nn.Module
    pad_id: int
    share: bool

    def batch(self, rows: Sequence[TokenisedAnchor]) -> AnchorBatch:
        """Collate anchors; the last reply token is a label only, so it is not fed."""
        fed = [row.prompt + row.reply[:-1] for row in rows]
        # A prediction that is scored must come from a row's own part, so the prefix ends before the last prompt token.
        longest = min(len(row.prompt) for row in rows) - 1
        shared = min(prefix.shared_length(fed), longest) if self.share else 0
        width = max(len(row.reply) for row in rows)
        labels = torch.full((len(rows), width), -100)
        for index, row in enumerate(rows):
            labels[index, width - len(row.reply) :] = torch.tensor(row.reply)
        device = next(self.model.parameters()).device
        return AnchorBatch(prefix.collate(fed, self.pad_id, shared).to(device), labels.to(device))

    def losses(self, rows: Sequence[TokenisedAnchor]) -> Tensor:
        """One loss an anchor, differentiable."""
        return self.batch(rows).losses(self.model)

    def divergences(self, rows: Sequence[TokenisedAnchor], likely: Likely) -> Tensor:
        """How far the model is from the aligned one at each anchor (nats a token), differentiable."""
        batch = self.batch(rows)
        return divergences(batch.logits(self.model), likely.to(batch.labels.device))

    def chances(self, rows: Sequence[TokenisedAnchor], openings: Sequence[list[int]]) -> Tensor:
        """Log-probability that the reply to each anchor's request opens so: anchors x openings, differentiable."""
        if self.share:
            return prefix.branch_chances(self.model, [row.prompt for row in rows], openings, self.pad_id)
        asked = [TokenisedAnchor(row.prompt, list(opening)) for row in rows for opening in openings]
        lengths = torch.tensor([len(row.reply) for row in asked])
        losses = self.losses(asked)
        return -(losses * lengths.to(losses.device)).view(len(rows), len(openings))

    @torch.no_grad()
    def likely(self, rows: Sequence[TokenisedAnchor], at_once: int = 16) -> Likely:
        """What the model at its current parameters would say at every anchor's supervised tokens; on the CPU."""
        parts = []
        for start in range(0, len(rows), at_once):
            batch = self.batch(rows[start : start + at_once])
            parts.append(likely_of(batch.logits(self.model), batch.used).to(torch.device("cpu")))
        return joined(parts)

    @torch.no_grad()
    def measure(self, rows: Sequence[TokenisedAnchor], at_once: int = 16) -> Tensor:
        """Loss of every anchor at the current parameters; (anchors,) nats, on the CPU."""
        parts = [self.losses(rows[start : start + at_once]).cpu() for start in range(0, len(rows), at_once)]
        return torch.cat(parts)


def tokenise(loaded: LoadedModel, anchor: Anchor, system: str | None, decision_tokens: int | None) -> TokenisedAnchor:
    """Render one anchor.

    Args:
        decision_tokens: supervise only the first so many tokens of the reply; None: all, and the end of turn.

    Raises:
        GuardError: when no token would be supervised.
    """
    if anchor.reply is None:
        raise GuardError(
            "an anchor has no reply yet", seen=anchor.request, fix="let the aligned model write it: distill()"
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    prompt = render(loaded, [*messages, {"role": "user", "content": anchor.request}])
    reply: list[int] = loaded.tokenizer(anchor.reply, add_special_tokens=False)["input_ids"]
    if decision_tokens is None:
        reply = [*reply, turn_end(loaded)]
    elif decision_tokens < 1:
        raise GuardError("at least one decision token is needed", seen=decision_tokens)
    else:
        reply = reply[:decision_tokens]
    if not reply:
        raise GuardError("an anchor has no supervised token", seen=anchor.request, fix="give it a reply with text")
    return TokenisedAnchor(prompt=prompt, reply=reply)


def turn_end(loaded: LoadedModel) -> int:
    """The token with which the chat template ends a reply, which need not be the tokenizer's end of text.

    Taken from a rendered reply. The end of text where the template writes nothing after a reply, or no token that
    stands for an end there.
    """
    tokenizer, reply = loaded.tokenizer, "reply"
    require_chat_template(tokenizer, loaded.name)
    chat = [{"role": "user", "content": "request"}, {"role": "assistant", "content": reply}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    _, found, tail = text.rpartition(reply)
    after: list[int] = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}  # not every end is declared special
    end: int = after[0] if after and after[0] in marks else tokenizer.eos_token_id
    return end


def build_pools(loaded: LoadedModel, anchors: SafetyAnchors, decision_tokens: int | None) -> dict[Side, AnchorPool]:
    """One pool a side that has anchors; replies must be there already."""
    pools = {}
    for side in SIDES:
        rows = [tokenise(loaded, anchor, anchors.system, decision_tokens) for anchor in anchors.side(side)]
        if rows:
            pools[side] = AnchorPool(side, rows)
    return pools


def reader_for(loaded: LoadedModel, model: nn.Module) -> AnchorReader:
    """The reader of a model that is being trained."""
    keep_order(model)
    pad = loaded.tokenizer.pad_token_id
    return AnchorReader(model=model, pad_id=pad if pad is not None else 0, share=prefix.supports(model))
