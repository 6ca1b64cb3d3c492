"""Activations that sparsity thresholds and smoothing scales are set by.

Covered: one pass over calibration rows, a bounded sample and the per-channel maximum at each site; the rows that are
used by default (bundled training instructions and requests as chats, never an evaluation prompt). Not covered: what is
made of them (``sparsity.py``, ``quantization.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.approximation.sites import LayerSites, Site, evaluating
from trimtab.approximation.technique import Edit, Rows
from trimtab.errors import ApproximationError, DataError

DEFAULT_ROWS = 64
SAMPLE = 1 << 16  # values kept at each site
BATCH = 16


@dataclass(frozen=True)
class Calibration:
    """Seen activations.

    Attributes:
        ids: calibration rows. values: (layer, site) -> sorted sample of activations, float32; "activation" holds the
            activation function's output. largest: (layer, site) -> largest magnitude of each channel.
        inputs: (layer, site) -> some whole activations, tokens x channels, for fitting; input sites only.
    """

    ids: tuple[tuple[int, ...], ...]
    values: dict[tuple[int, Site], Tensor]
    largest: dict[tuple[int, Site], Tensor]
    inputs: dict[tuple[int, Site], Tensor]

    def quantile(self, layer: int, site: Site, share: float) -> float:
        """The value below which ``share`` of the activations at a site lie, by linear interpolation."""
        sample = self.values[layer, site]
        place = share * (len(sample) - 1)
        low = int(place)
        high = min(low + 1, len(sample) - 1)
        return float(sample[low] + (place - low) * (sample[high] - sample[low]))

    def magnitude(self, layer: int, site: Site, share: float) -> float:
        """The magnitude below which ``share`` of the activations at a site lie."""
        return float(torch.quantile(self.values[layer, site].abs(), share))


def default_rows(tokenizer: Any, count: int = DEFAULT_ROWS) -> tuple[tuple[int, ...], ...]:
    """Token ids of bundled training instructions with short harmless answers, by the model's own chat template.

    Raises:
        DataError: where the tokenizer has no chat template.
    """
    from trimtab import data

    if not tokenizer.chat_template:
        raise DataError(
            "calibration needs a chat template", fix="give rows of token ids: calibration_rows=[[...], ...]"
        )
    questions = data.instructions("train")[: count // 2]
    pairs = data.interleaved(data.requests("train"))
    questions += [pair.benign for pair in pairs[: count - len(questions)]]
    answers = data.affirmations()
    rows = []
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[number % len(answers)]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        rows.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return tuple(rows)


def rows_for(model: Any, base: Any) -> Sequence[Sequence[int]]:
    """Rows by the model's own tokenizer: given with a ``LoadedModel``, else found by the model's name.

    Raises:
        ApproximationError: where there is none. DataError: as ``default_rows``.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        tokenizer = _tokenizer_of(str(getattr(base, "name_or_path", "")))
    return default_rows(tokenizer)


def _tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    from trimtab.demo_model import dequantised
    from trimtab.model_names import DEMO_NAMES

    try:
        return AutoTokenizer.from_pretrained(dequantised() if name in DEMO_NAMES else name)
    except (OSError, ValueError) as error:
        fix = "give trimtab's LoadedModel instead of the bare model, or calibration_rows=[[...], ...]"
        raise ApproximationError("this technique calibrates, and no tokenizer was found", seen=name, fix=fix) from error


def collect(base: Any, layers: Sequence[LayerSites], ids: Sequence[Sequence[int]]) -> Calibration:
    """Read the rows once, unapproximated, and keep what the techniques need.

    Raises:
        DataError: without rows.
    """
    from trimtab.approximation.apply import installed

    if not ids or not all(len(row) > 1 for row in ids):
        raise DataError(
            "calibration needs rows of at least two tokens", seen=f"{len(ids)} rows", fix="give longer rows"
        )
    watcher = _Watcher(Rows())
    edits = [edit for layer in layers for edit in watcher.edits(layer)]
    order = sorted(ids, key=len)
    with evaluating(base), installed(base, layers, edits, watcher.rows), torch.no_grad():  # a trainer's has dropout on
        for start in range(0, len(order), BATCH):
            batch, mask = padded(order[start : start + BATCH])
            base(
                input_ids=batch.to(base.device), attention_mask=mask.to(base.device), use_cache=False, logits_to_keep=1
            )
    return watcher.result(ids)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask: causal attention never sees the padding, and the watcher drops it."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def stride(values: int, kept: int, width: int) -> int:
    """The largest step that keeps at least ``kept`` of the values and, sharing no factor with ``width``, visits every
    channel: what lies in rows of ``width`` channels is otherwise read in a few of them only."""
    step = max(1, values // kept)
    while math.gcd(step, width) > 1:
        step -= 1
    return step


class _Watcher:
    """Edits that change nothing and keep what they saw."""

    def __init__(self, rows: Rows, keep_tokens: int = 512) -> None:
        self.rows, self.keep_tokens = rows, keep_tokens
        self.parts: dict[tuple[int, Site], list[Tensor]] = {}
        self.largest: dict[tuple[int, Site], Tensor] = {}
        self.inputs: dict[tuple[int, Site], Tensor] = {}

    def edits(self, layer: LayerSites) -> list[Edit]:
        sites: tuple[Site, ...] = ("attn_in", "attn_out", "up", "down")
        plain = [Edit(layer.index, site, self._looking_on(layer.index, site)) for site in sites]

        def activated(x: Tensor) -> Tensor:
            value: Tensor = layer.activation.forward(x)
            self._keep(layer.index, "activation", value)
            return value

        return [*plain, Edit(layer.index, "activation", activated)]

    def _looking_on(self, layer: int, site: Site) -> Any:
        def look(x: Tensor) -> Tensor:
            self._keep(layer, site, x)
            return x

        return look

    def _keep(self, layer: int, site: Site, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])  # tokens x channels
        real = self.rows.real
        if real is not None and self.rows.selected is None and real.numel() == flat.shape[0]:
            flat = flat[real.reshape(-1).to(flat.device)]  # layers may lie on several devices
        elif real is not None and self.rows.selected is not None and self.rows.selected.numel() == flat.shape[0]:
            flat = flat[real.reshape(-1)[self.rows.selected].to(flat.device)]
        if not len(flat):
            return
        key = (layer, site)
        highest = flat.abs().amax(0).float()
        self.largest[key] = torch.maximum(self.largest[key], highest) if key in self.largest else highest
        step = stride(flat.numel(), SAMPLE // 6, flat.shape[1])
        self.parts.setdefault(key, []).append(flat.reshape(-1)[::step].float().clone())
        kept = self.inputs.get(key)
        if site in ("attn_in", "up") and (kept is None or len(kept) < self.keep_tokens):
            new = flat[: self.keep_tokens].float().clone()
            self.inputs[key] = new if kept is None else torch.cat([kept, new])[: self.keep_tokens]

    def result(self, ids: Sequence[Sequence[int]]) -> Calibration:
        values = {key: torch.cat(parts).sort().values for key, parts in self.parts.items()}
        return Calibration(tuple(map(tuple, ids)), values, self.largest, self.inputs)
