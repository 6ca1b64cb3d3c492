"""Stacked experts run one by one, so that the activation is a module's call and the down input can be edited.

The sums are those of Transformers' own "eager" experts, in its order, so with nothing to edit the logits are equal bit
for bit. (Its default, one grouped product, sums in another order: in half precision a last digit differs.)

Covered: stacks of gate and up together, and of down, in plain floating numbers. Not covered: biases, transposed or
packed stacks (refused).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.approximation.technique import Rows
from trimtab.approximation.weights import is_plain
from trimtab.errors import ApproximationError


def open_experts(module: Any, downs: Sequence[Callable[[Tensor], Tensor]], rows: Rows) -> Callable[[], None]:
    """Put that forward on the module; returns what removes it.

    Raises:
        ApproximationError: for experts with biases, without a gate, with transposed or packed weights.
    """
    check_experts(module)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)  # tokens x hidden
        for expert in top_k_index.unique().tolist():
            if expert >= module.num_experts:
                continue
            place, token = torch.where(expert == top_k_index.T)
            rows.selected = token
            both = nn.functional.linear(hidden_states[token], module.gate_up_proj[expert])
            gate, up = both.chunk(2, dim=-1)
            value = module.act_fn(gate) * up
            for function in downs:
                value = function(value)
            rows.selected = None
            value = nn.functional.linear(value, module.down_proj[expert]) * top_k_weights[token, place, None]
            total.index_add_(0, token, value.to(total.dtype))
        return total

    before = vars(module).get("forward")  # a wrapper's own, such as accelerate's; None where it is the class's
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def check_experts(module: Any) -> None:
    """Whether the stacks can be read.

    Raises:
        ApproximationError: as ``open_experts``.
    """
    odd = [name for name in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(module, name, False)]
    odd += [
        f"{name} of {weight.dtype}"
        for name in ("gate_up_proj", "down_proj")
        if not is_plain(weight := getattr(module, name))
    ]
    if odd or not getattr(module, "has_gate", True) or not hasattr(module, "act_fn"):
        raise ApproximationError(
            "these experts are of a kind that is not supported; looked for stacks of plain floating weights, a gate, "
            "no bias",
            seen=f"{type(module).__name__}: {', '.join(odd) or 'no gate or no activation module'}",
            fix="limit the technique to attention (kv8), or name the unquantised model",
        )
