"""Read a prefix that all rows share once instead of once a row.

Chat templates put the same system message before every request; for short requests that is half of all tokens. The
prefix is read as one row, its keys and values are expanded to the batch, and the rest follows; gradients flow through.

Covered: causal models whose cache is Transformers' ``DynamicCache``. Not covered: sliding-window or recurrent caches,
for which ``supports`` says no and the caller reads whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.precision import at_least_float32

LEAST_TOKENS = 4  # a shorter prefix does not pay for a second pass


class PrefixedBatch(NamedTuple):
    """``prefix``: 1 x P ids (P may be 0). ``ids``, ``mask``: rows x width of what follows."""

    prefix: Tensor
    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> PrefixedBatch:
        """The same on another device."""
        return PrefixedBatch(*(part.to(device) for part in self))


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading ids that all rows share, leaving each row at least one id of its own; 0 for a single row."""
    if len(rows) < 2:
        return 0
    first, last = (
        min(map(list, rows)),
        max(map(list, rows)),
    )  # in lexicographic order, what these two share all rows share
    limit = min(map(len, rows)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return length if length >= LEAST_TOKENS else 0


def collate(rows: Sequence[Sequence[int]], pad_id: int, shared: int) -> PrefixedBatch:
    """Split off the first ``shared`` ids and right-align the rest."""
    width = max(len(row) - shared for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        rest = row[shared:]
        ids[index, width - len(rest) :] = torch.tensor(rest)
        mask[index, width - len(rest) :] = 1
    return PrefixedBatch(prefix=torch.tensor([list(rows[0][:shared])], dtype=torch.long), ids=ids, mask=mask)


def read(model: Any, batch: PrefixedBatch, **options: Any) -> Any:
    """The model's output for the rows' own part; positions and attention are those of whole, unpadded rows."""
    rows, length = batch.ids.shape[0], batch.prefix.shape[1]
    if length == 0:
        positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
        return model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False, **options)
    cache = expanded_prefix(model, batch.prefix, rows)
    mask = torch.cat([batch.mask.new_ones(rows, length), batch.mask], dim=1)
    positions = (mask.cumsum(1) - 1)[:, length:]
    return model(
        input_ids=batch.ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, **options
    )


def reply_logits(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> list[Tensor]:
    """For each row (ids of a prompt, ids of its reply) the logits that predict the reply: reply tokens x vocabulary.

    Float32 at least, differentiable; only the replies' positions pass through the output layer.
    """
    fed = [[*prompt, *reply[:-1]] for prompt, reply in rows]
    longest = min(len(prompt) for prompt, _ in rows) - 1
    shared = min(shared_length(fed), longest) if supports(model) else 0
    batch = collate(fed, pad_id, shared).to(model.device)
    width = max(len(reply) for _, reply in rows)
    logits = at_least_float32(read(model, batch, logits_to_keep=width).logits)
    return [logits[index, width - len(reply) :] for index, (_, reply) in enumerate(rows)]


def branch_chances(
    model: Any, prompts: Sequence[Sequence[int]], branches: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """Log-probability of every branch as the beginning of every prompt's reply: prompts x branches, differentiable.

    Each prompt is read once, whatever the number of branches; ``supports`` says whether the model can be read so.

    Args:
        model: a causal model.
        prompts: ids of rendered requests.
        branches: ids of what a reply may begin with; none is empty.
        pad_id: fills rows up.
    """
    batch = collate(prompts, pad_id, shared_length(prompts)).to(model.device)
    rows, length, count = len(prompts), batch.prefix.shape[1], len(branches)
    mask = torch.cat([batch.mask.new_ones(rows, length), batch.mask], dim=1)
    known = {"cache": expanded_prefix(model, batch.prefix, rows)} if length else {}
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, length:]
    read_once = model(
        input_ids=batch.ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **known
    )
    first = torch.tensor([branch[0] for branch in branches], device=model.device)
    total: Tensor = at_least_float32(read_once.logits[:, -1]).log_softmax(-1)[:, first]  # prompts x branches
    fed = collate_right([branch[:-1] for branch in branches], pad_id).to(model.device)
    if fed.ids.shape[1] == 0:
        return total
    for layer in read_once.cache.layers:
        layer.keys = layer.keys.repeat_interleave(count, dim=0)
        layer.values = layer.values.repeat_interleave(count, dim=0)
    follows, valid = fed.ids.repeat(rows, 1), fed.mask.repeat(rows, 1)
    starts = mask.sum(1, keepdim=True).repeat_interleave(count, dim=0)
    logits = model(
        input_ids=follows,
        attention_mask=torch.cat([mask.repeat_interleave(count, dim=0), valid], dim=1),
        position_ids=starts + torch.arange(follows.shape[1], device=model.device),
        cache=read_once.cache,
        use_cache=True,
    ).logits  # (prompts x branches) x width x vocabulary
    said = collate_right([branch[1:] for branch in branches], pad_id).ids.to(model.device).repeat(rows, 1)
    each = at_least_float32(logits).log_softmax(-1).gather(-1, said[..., None])[..., 0]
    after: Tensor = (each * valid).sum(1).view(rows, count)
    return total + after


def collate_right(rows: Sequence[Sequence[int]], pad_id: int) -> PrefixedBatch:
    """Rows filled up on the right, no prefix."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long).view(
        len(rows), width
    )
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return PrefixedBatch(torch.empty(1, 0, dtype=torch.long), ids, mask.view(len(rows), width))


def expanded_prefix(model: Any, prefix: Tensor, rows: int) -> Any:
    """Keys and values of the prefix, read once and seen by every row."""
    cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1).cache
    for layer in cache.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache


def supports(model: Any) -> bool:
    """Whether this model's cache can be expanded: every layer a plain growing one, no approximation of whole rows."""
    return not getattr(model, "_trimtab_whole_rows", False) and grows_plainly(model)


def grows_plainly(model: Any) -> bool:
    """Whether every layer keeps all its keys and values: no sliding window, no recurrence, nothing shared by layers."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(config, "num_kv_shared_layers", 0):
        return False
    kinds = getattr(config, "layer_types", None) or []
    plain = all(kind == "full_attention" for kind in kinds) and not getattr(config, "sliding_window", None)
    return plain and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
