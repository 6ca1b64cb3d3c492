"""Attention whose exponential, query, keys or values are approximated, through Transformers' attention interface.

While an approximation needs it, the model's attention implementation is one of the two registered here; each looks up
its layer's edits. Keys and values are edited after the cache returns them: the rounding of a token depends on that
token alone, so this equals a cache that stores rounded values, works with any cache, and changes none.

Covered: eager and SDPA models, soft-capped scores, grouped heads. Not covered: attention sinks (raises), flash
attention (the attention written out is used in its place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.errors import ApproximationError

EAGER, SDPA = "trimtab_eager", "trimtab_sdpa"


@dataclass
class AttentionEdits:
    """Functions of one layer's attention; None where exact. ``exp`` gets scores minus their row's maximum."""

    query: Callable[[Tensor], Tensor] | None = None
    key: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    exp: Callable[[Tensor], Tensor] | None = None


_ACTIVE: WeakKeyDictionary[nn.Module, AttentionEdits] = WeakKeyDictionary()


def switch_on(base: Any, edits: dict[nn.Module, AttentionEdits]) -> Callable[[], None]:
    """Route a model's attention through the edits; returns what undoes it.

    Raises:
        ApproximationError: where the model cannot change its attention implementation.
    """
    _register()
    before = base.config._attn_implementation
    exact_softmax = all(edit.exp is None for edit in edits.values())
    chosen = SDPA if before == "sdpa" and exact_softmax else EAGER
    base.set_attn_implementation(chosen)
    if base.config._attn_implementation != chosen:
        raise ApproximationError(
            "this model's attention cannot be approximated",
            seen=type(base).__name__,
            fix="leave approximations of attention out: softmax=no, no kv8 or kv4",
        )
    for module, edit in edits.items():
        _ACTIVE[module] = edit

    def undo() -> None:
        base.set_attn_implementation(before)
        for module in edits:
            _ACTIVE.pop(module, None)

    return undo


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(EAGER, eager_attention)
    AttentionInterface.register(SDPA, sdpa_attention)
    AttentionMaskInterface.register(EAGER, eager_mask)
    AttentionMaskInterface.register(SDPA, sdpa_mask)


def _edited(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's vectors (rows x heads x tokens x size) by their own function."""
    edit = _ACTIVE.get(module)
    if edit is None:
        return query, key, value
    parts = ((edit.query, query), (edit.key, key), (edit.value, value))
    first, second, third = (part if function is None else function(part) for function, part in parts)
    return first, second, third


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Edits of query, key and value in front of PyTorch's attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = _edited(module, query, key, value)
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; (rows x tokens x heads x size, weights)."""
    if options.get("s_aux") is not None:
        raise ApproximationError(
            "attention sinks cannot be approximated",
            seen=type(module).__name__,
            fix="leave approximations of attention out: softmax=no, no kv8 or kv4",
        )
    query, key, value = _edited(module, query, key, value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * factor
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    edit = _ACTIVE.get(module)
    if edit is None or edit.exp is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    else:
        weights = softmax_by(edit.exp, scores).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def softmax_by(exp: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """Softmax over the last dimension with another exponential; masked scores (the type's minimum) get no weight."""
    floor = torch.finfo(scores.dtype).min / 2
    scores = scores.float()
    seen = scores > floor
    # A row of nothing but masked scores may be -inf throughout in float16; it must not become NaN.
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    raised = exp((scores - highest).clamp(min=-100.0, max=0.0)) * seen
    return raised / raised.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
