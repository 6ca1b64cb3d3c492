"""What the aligned model itself would say next, kept small: its likeliest tokens, and one outcome for all others.

Covered: keeping it for anchors of different lengths, and the divergence of another model from it, differentiable.
Not covered: which tokens are watched (``pools.py``) and what follows from a divergence (``keel.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.precision import at_least_float32

LIKELIEST = 16  # a refusal's first tokens have few alternatives; 3 tokens of 168 anchors then take 64 KB


class Likely(NamedTuple):
    """At the positions of anchors' supervised tokens, aligned on the right (the last column is the last token).

    ``tokens``: anchors x width x K ids; ``chances``: anchors x width x (K + 1) log-probabilities (nats), the last one
    of all other tokens together; ``used``: anchors x width, whether there is a token.
    """

    tokens: Tensor
    chances: Tensor
    used: Tensor

    def of(self, anchors: Sequence[int], width: int) -> Likely:
        """Those of some anchors, with so many columns."""
        return Likely(*(part[list(anchors)][:, part.shape[1] - width :] for part in self))

    def to(self, device: torch.device) -> Likely:
        """On another device."""
        return Likely(*(part.to(device) for part in self))


def likely_of(logits: Tensor, used: Tensor, count: int = LIKELIEST) -> Likely:
    """Keep the ``count`` likeliest tokens of every position.

    Args:
        logits: anchors x width x vocabulary.
        used: anchors x width.
        count: how many; all but one of a smaller vocabulary.
    """
    tokens = logits.topk(min(count, logits.shape[-1] - 1), dim=-1).indices
    return Likely(tokens, _chances(logits, tokens), used)


def divergences(logits: Tensor, likely: Likely) -> Tensor:
    """``KL(aligned || this model)`` over the kept outcomes, mean over each anchor's tokens; (anchors,) nats.

    Joining outcomes never raises a divergence, so this is a lower bound of the one over the vocabulary.

    Args:
        logits: anchors x width x vocabulary, of the model that is trained.
        likely: of the aligned model, same anchors and width.
    """
    apart = likely.chances.exp() * (likely.chances - _chances(logits, likely.tokens))  # anchors x width x (K + 1)
    return (apart.sum(-1) * likely.used).sum(1) / likely.used.sum(1)


def joined(parts: Sequence[Likely]) -> Likely:
    """Several sets of anchors in one; narrower ones are filled up on the left."""
    width = max(part.used.shape[1] for part in parts)
    return Likely(*(torch.cat([_widened(one, width) for one in same]) for same in zip(*parts, strict=True)))


def _chances(logits: Tensor, tokens: Tensor) -> Tensor:
    everything = at_least_float32(logits).log_softmax(-1)
    others = everything.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([everything.gather(-1, tokens), others], dim=-1)


def _widened(part: Tensor, width: int) -> Tensor:
    filled = part.new_zeros(part.shape[0], width, *part.shape[2:])
    filled[:, width - part.shape[1] :] = part
    return filled
