"""Keys and values of rows that come and go: every row has a slot; a new prompt moves into the slot of a finished one.

All rows share one column counter: what a row reads next stands in the same column for all, and what stands left of a
row's first token is masked. A prompt that moves in is therefore right-aligned to the present column. Keys are stored
after their rotation, so a row's columns say nothing of its positions, which are counted for each row.

Covered: models whose cache is a plain growing one. Not covered: choosing tokens and prompts (``decoding.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from trimtab import prefix

SPARE_COLUMNS = 64  # columns by which buffers grow


class SlotLayer(DynamicLayer):
    """One layer's keys and values, written in place.

    Args:
        keys: slots x heads x width x head size, and values likewise.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers = (keys, values)  # wider than ``length``, so that a step copies one column only
        self.length = keys.shape[2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append one column for every slot; the columns so far."""
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.buffers = (_widened(self.buffers[0], end), _widened(self.buffers[1], end))
        keys, values = self.buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        """Columns written so far."""
        return self.length

    def rearrange(self, kept: Tensor, slots: int, first: int, width: int) -> None:
        """Slots ``kept`` in that order, then empty ones; columns before ``first`` go, the rest ends at ``width``."""
        keys, values = (_moved(part, kept, slots, first, self.length, width) for part in self.buffers)
        self.buffers, self.length = (keys, values), width

    def put(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write whole rows (len(places) x heads x columns x head size) into slots, right-aligned to the last column."""
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[places, :, self.length - part.shape[2] : self.length] = part


class Reading(NamedTuple):
    """What reading prompts gave: each layer's keys and values, who may look where, and the last position's logits.

    ``layers``: pairs of rows x heads x width x head size; ``mask``: rows x width; ``logits``: rows x vocabulary.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    logits: Tensor


class Reader:
    """Reads prompts; what all of them begin with is read once and remembered for the next ones."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.shares = prefix.supports(model)
        self.begun: list[int] = []  # the remembered beginning
        self.memory: Any = None  # and its cache, one row

    def read(self, prompts: Sequence[list[int]]) -> Reading:
        """Keys, values and next-token logits of all prompts, padded on the left of what they do not share."""
        shared = self._beginning(prompts) if self.shares else 0
        batch = prefix.collate(prompts, self.pad_id, shared).to(self.model.device)
        rows = len(prompts)
        mask = torch.cat([batch.mask.new_ones(rows, shared), batch.mask], dim=1)  # rows x width
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, shared:]
        output = self.model(
            input_ids=batch.ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **({"cache": _expanded(self.memory, rows)} if shared else {}),
        )  # fmt: skip
        layers = [(layer.keys, layer.values) for layer in output.cache.layers]
        return Reading(layers, mask, output.logits[:, -1])

    def _beginning(self, prompts: Sequence[list[int]]) -> int:
        """Length of the beginning to take from memory; reads it first where the remembered one does not fit."""
        size = len(self.begun)
        if size and all(len(ids) > size and ids[:size] == self.begun for ids in prompts):
            return size
        shared = prefix.shared_length(prompts)
        if shared:
            self.begun = list(prompts[0][:shared])
            ids = torch.tensor([self.begun], device=self.model.device)
            self.memory = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).cache
        return shared


class Slots:
    """The rows being answered. ``mask``: slots x columns, 1 where a row may look."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    @property
    def count(self) -> int:
        """Slots, free or not."""
        return self.mask.shape[0]

    def put(self, reading: Reading, places: Sequence[int]) -> None:
        """Move prompts that were read into free slots; the columns grow to hold them."""
        width = reading.mask.shape[1]
        if width > self.mask.shape[1]:
            self.rearrange(range(self.count), self.count, 0, width)
        where = torch.tensor(list(places), device=self.mask.device)
        self.mask[where] = 0
        self.mask[where, self.mask.shape[1] - width :] = reading.mask
        for layer, (keys, values) in zip(self.cache.layers, reading.layers, strict=True):
            layer.put(where, keys, values)

    def start(self, reading: Reading) -> None:
        """The first prompts: their keys and values become the slots."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = [SlotLayer(keys, values) for keys, values in reading.layers]
        self.mask = reading.mask

    def rearrange(self, kept: Sequence[int], slots: int, first: int | None = None, width: int | None = None) -> None:
        """Keep these slots, in that order, and have ``slots`` of them; columns that nobody looks at any more go."""
        index = torch.tensor(list(kept), device=self.mask.device, dtype=torch.long)
        first = self.unseen(kept) if first is None else first
        width = self.mask.shape[1] - first if width is None else width
        wide = self.mask[:, None, :, None]
        self.mask = _moved(wide, index, slots, first, self.mask.shape[1], width, spare=0)[:, 0, :, 0]
        for layer in self.cache.layers:
            layer.rearrange(index, slots, first, width)

    def unseen(self, kept: Sequence[int]) -> int:
        """Number of leading columns that none of these slots looks at."""
        seen = self.mask[list(kept)].amax(0) if len(kept) else self.mask.new_zeros(self.mask.shape[1])
        return int(seen.argmax()) if bool(seen.any()) else self.mask.shape[1]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read one token in every slot (both: slots); next-token logits, slots x vocabulary."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.count, 1)], dim=1)
        output = self.model(
            input_ids=tokens[:, None], attention_mask=self.mask, position_ids=positions[:, None], cache=self.cache,
            use_cache=True,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits


def _expanded(memory: Any, rows: int) -> Any:
    """The remembered beginning for so many rows; the memory itself stays as it is."""
    cache = copy.copy(memory)
    cache.layers = [copy.copy(layer) for layer in memory.layers]
    for layer in cache.layers:
        layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


def _widened(part: Tensor, columns: int) -> Tensor:
    wider = part.new_zeros(*part.shape[:2], columns + SPARE_COLUMNS, part.shape[3])
    wider[:, :, : part.shape[2]] = part
    return wider


def _moved(
    part: Tensor, kept: Tensor, slots: int, first: int, length: int, width: int, spare: int = SPARE_COLUMNS
) -> Tensor:
    moved = part.new_zeros(slots, part.shape[1], width + spare, part.shape[3])
    moved[: len(kept), :, width - (length - first) : width] = part[kept, :, first:length]
    return moved
