"""What ``keel`` holds an anchor to: the aligned model's words, its distribution, or its decision.

Covered: the loss of every anchor under each, what it was in the aligned model, and the openings of its refusals.
Not covered: which anchors are looked at, and what follows from a drift (``keel.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimtab.anchors import Side
from trimtab.tuning.likely import joined
from trimtab.tuning.pools import AnchorPool, AnchorReader

Pools = Mapping[Side, AnchorPool]
Chosen = Mapping[Side, Sequence[int]]  # places in the pool of each side

OPENING_TOKENS = 3  # "I'm sorry", "I cannot": where it is told whether a reply refuses
MOST_OPENINGS = 4  # an aligned model has few ways to refuse
LEAST_SHARE = 0.05  # of the refusals; rarer openings say little of how this model refuses
SURE = 4.0  # nats of log-odds: a chance of 1.8 %; that an answer is surer than this is nothing to hold
LEAST_COVERED = 0.5  # of the refusals, by all openings together; a model below that has no way of its own to refuse


class Sensor(Protocol):
    """Losses of anchors, and their floors: the losses in the aligned model (nats; (anchors,) a side)."""

    def prepare(self, reader: AnchorReader, pools: Pools) -> None:
        """Keep what is needed of the aligned model, which this still is."""

    def losses(self, reader: AnchorReader, pools: Pools, chosen: Chosen) -> dict[Side, Tensor]:
        """One loss an anchor, differentiable."""

    def floors(self, pools: Pools, side: Side, indices: Sequence[int]) -> Tensor:
        """What the same anchors cost in the aligned model; on the CPU."""


class Words:
    """Mean cross-entropy of the aligned model's own first tokens."""

    def prepare(self, reader: AnchorReader, pools: Pools) -> None:
        """Nothing: the references of the pools are these losses."""

    def losses(self, reader: AnchorReader, pools: Pools, chosen: Chosen) -> dict[Side, Tensor]:
        rows = [pools[side].rows[index] for side, indices in chosen.items() for index in indices]
        return _split(reader.losses(rows), {side: len(indices) for side, indices in chosen.items()})

    def floors(self, pools: Pools, side: Side, indices: Sequence[int]) -> Tensor:
        return pools[side].references(indices)


class Distribution:
    """``KL(aligned || trained)`` at those tokens."""

    def prepare(self, reader: AnchorReader, pools: Pools) -> None:
        for pool in pools.values():
            pool.likely = reader.likely(pool.rows)

    def losses(self, reader: AnchorReader, pools: Pools, chosen: Chosen) -> dict[Side, Tensor]:
        rows = [pools[side].rows[index] for side, indices in chosen.items() for index in indices]
        likely = joined([pools[side].likeliest(indices) for side, indices in chosen.items()])
        return _split(reader.divergences(rows, likely), {side: len(indices) for side, indices in chosen.items()})

    def floors(self, pools: Pools, side: Side, indices: Sequence[int]) -> Tensor:  # noqa: ARG002 - one for all
        return torch.zeros(len(indices))


class Decision:
    """Refusals: as ``Words``. Innocent requests: the log-odds that the reply opens like a refusal.

    ``l = log(P / (1 - P)) / 3``, P the chance of such an opening, over the three tokens of an opening, so that a nat is
    a nat a token on both sides. An innocent anchor may be answered in any words; only being refused more readily than
    by the aligned model is a drift, and of one that is answered for sure (log-odds below ``-SURE``) only what rises
    above that. Where there are no refusals whose openings could be learnt, or they open in too many ways, innocent
    requests are held by their words.
    """

    def prepare(self, reader: AnchorReader, pools: Pools) -> None:
        if openings := openings_of(pools):
            rows, at_once = pools["answer"].rows, 16
            with torch.no_grad():
                parts = [
                    odds(reader.chances(rows[start : start + at_once], openings)).cpu()
                    for start in range(0, len(rows), at_once)
                ]
            pools["answer"].reference = torch.cat(parts).clamp_min(-SURE) / OPENING_TOKENS

    def losses(self, reader: AnchorReader, pools: Pools, chosen: Chosen) -> dict[Side, Tensor]:
        openings = openings_of(pools)
        if "answer" not in chosen or not openings:
            return SENSORS["words"].losses(reader, pools, chosen)
        rest: dict[Side, Sequence[int]] = {side: indices for side, indices in chosen.items() if side != "answer"}
        found = SENSORS["words"].losses(reader, pools, rest) if rest else {}
        rows = [pools["answer"].rows[index] for index in chosen["answer"]]
        return {**found, "answer": odds(reader.chances(rows, openings)) / OPENING_TOKENS}

    def floors(self, pools: Pools, side: Side, indices: Sequence[int]) -> Tensor:
        return pools[side].references(indices)


SENSORS: dict[str, Sensor] = {"decision": Decision(), "words": Words(), "distribution": Distribution()}


def openings_of(pools: Pools) -> list[list[int]]:
    """The ways in which the refusals open: token ids, the most frequent first, none the beginning of another.

    Empty where a side is missing or ``MOST_OPENINGS`` of them cover less than ``LEAST_COVERED`` of the refusals.
    """
    if not {"refuse", "answer"} <= set(pools):
        return []
    refusals = pools["refuse"].rows
    counts = Counter(tuple(row.reply[:OPENING_TOKENS]) for row in refusals)
    found: list[tuple[int, ...]] = []
    for opening, count in counts.most_common():
        overlaps = any(opening[: len(other)] == other or other[: len(opening)] == opening for other in found)
        if count >= LEAST_SHARE * len(refusals) and not overlaps and len(found) < MOST_OPENINGS:
            found.append(opening)
    covered = sum(counts[opening] for opening in found)
    return [list(opening) for opening in found] if covered >= LEAST_COVERED * len(refusals) else []


def odds(chances: Tensor) -> Tensor:
    """``log(P / (1 - P))``, P the probability that a reply opens in one of these ways; (anchors,) nats, differentiable.

    Args:
        chances: log-probabilities, anchors x openings (none the beginning of another, so they exclude each other).
    """
    refused = chances.logsumexp(1)
    # 1 - P is no number where P is one. The value is held just below, its slope is kept: such an anchor is the one that
    # must be pulled back.
    refused = refused - (refused.detach() + 1e-6).clamp_min(0)
    sure, unsure = torch.log(-torch.expm1(refused)), torch.log1p(-refused.exp())  # each exact where it is taken
    return refused - torch.where(refused > -math.log(2), sure, unsure)


def _split(losses: Tensor, sizes: Mapping[Side, int]) -> dict[Side, Tensor]:
    return dict(zip(sizes, losses.split(list(sizes.values())), strict=True))
