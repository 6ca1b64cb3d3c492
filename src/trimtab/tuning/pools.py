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

from trimtab.anchors import SIDES, Anchor, SafetyAnchors, Side
from trimtab.errors import GuardError
from trimtab.generation import render
from trimtab.models import LoadedModel


class TokenisedAnchor(NamedTuple):
    """``prompt``: ids of the rendered request; ``reply``: ids of the supervised part of the reply."""

    prompt: list[int]
    reply: list[int]


@dataclass(frozen=True)
class AnchorBatch:
    """Rows aligned on the right. ``ids``, ``mask``: rows x width; ``labels``: rows x reply width, -100 where unused."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def losses(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy over each anchor's supervised tokens, one value a row (nats); differentiable.

        Only the positions that predict a supervised token go through the output layer.
        """
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)  # left padding must not shift absolute positions
        logits = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            logits_to_keep=self.labels.shape[1],
            use_cache=False,
        ).logits.float()  # rows x reply width x vocabulary
        token = F.cross_entropy(logits.transpose(1, 2), self.labels, ignore_index=-100, reduction="none")
        return token.sum(1) / (self.labels != -100).sum(1)


class AnchorPool:
    """The anchors of one side, with the loss that each had in the aligned model and a cursor that rotates over them."""

    def __init__(self, side: Side, rows: Sequence[TokenisedAnchor], pad_id: int) -> None:
        if not rows:
            raise GuardError(
                f"the pool of anchors to {side} is empty", fix="add anchors of that side, or hold one side only"
            )
        self.side = side
        self.rows = list(rows)
        self.pad_id = pad_id
        self.reference: Tensor | None = None  # (anchors,) nats, on the CPU
        self.cursor = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], device: torch.device) -> AnchorBatch:
        """Collate the chosen anchors; the last reply token is a label only, so it is not fed."""
        chosen = [self.rows[index] for index in indices]
        return collate(chosen, self.pad_id, device)

    def next_indices(self, count: int) -> list[int]:
        """The next ``count`` anchors in rotation (all of them where the pool is smaller)."""
        count = min(count, len(self.rows))
        indices = [(self.cursor + offset) % len(self.rows) for offset in range(count)]
        self.cursor = (self.cursor + count) % len(self.rows)
        return indices

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device, rows: int = 16) -> Tensor:
        """Loss of every anchor at the current parameters; (anchors,) nats, on the CPU."""
        parts = [
            self.batch(range(start, min(start + rows, len(self))), device).losses(model).cpu()
            for start in range(0, len(self), rows)
        ]
        return torch.cat(parts)


def collate(rows: Sequence[TokenisedAnchor], pad_id: int, device: torch.device) -> AnchorBatch:
    """Right-align rows of different length."""
    width = max(len(row.prompt) + len(row.reply) - 1 for row in rows)
    reply_width = max(len(row.reply) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), reply_width), -100)
    for index, row in enumerate(rows):
        fed = row.prompt + row.reply[:-1]
        ids[index, width - len(fed) :] = torch.tensor(fed)
        mask[index, width - len(fed) :] = 1
        labels[index, reply_width - len(row.reply) :] = torch.tensor(row.reply)
    return AnchorBatch(ids=ids.to(device), mask=mask.to(device), labels=labels.to(device))


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
        reply = [*reply, loaded.tokenizer.eos_token_id]
    elif decision_tokens < 1:
        raise GuardError("at least one decision token is needed", seen=decision_tokens)
    else:
        reply = reply[:decision_tokens]
    if not reply:
        raise GuardError("an anchor has no supervised token", seen=anchor.request, fix="give it a reply with text")
    return TokenisedAnchor(prompt=prompt, reply=reply)


def build_pools(loaded: LoadedModel, anchors: SafetyAnchors, decision_tokens: int | None) -> dict[Side, AnchorPool]:
    """One pool a side that has anchors; replies must be there already."""
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
    pools = {}
    for side in SIDES:
        rows = [tokenise(loaded, anchor, anchors.system, decision_tokens) for anchor in anchors.side(side)]
        if rows:
            pools[side] = AnchorPool(side, rows, pad)
    return pools
