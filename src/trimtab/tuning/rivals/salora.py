"""SaLoRA (arXiv 2501.01765): an adapter that cannot write into the safety features of its layer.

``V``: the top ``rank`` eigenvectors of ``W X^T X W^T``, the frozen layer's outputs on harmful requests. The adapter's
output is ``C B A x`` with ``C = I - V V^T``. C is put on B as a parametrisation and folded into it before saving, so
nothing is left in a hook. The source also starts from task-specific ``A_0, B_0`` (frozen weight ``W - C B_0 A_0``);
that is known second-hand only, so PEFT's own start is used here: a departure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab import prefix
from trimtab.errors import GuardError
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor


class Complement(nn.Module):
    """``B -> B - V (V^T B)``; V out x k, orthonormal."""

    V: Tensor

    def __init__(self, V: Tensor) -> None:
        super().__init__()
        self.register_buffer("V", V, persistent=False)

    def forward(self, B: Tensor) -> Tensor:
        result: Tensor = B - self.V @ (self.V.T @ B)
        return result


@torch.no_grad()
def safety_features(
    model: nn.Module, reader: AnchorReader, rows: Sequence[TokenisedAnchor], rank: int, at_once: int = 16
) -> dict[str, Tensor]:
    """By module name: the top eigenvectors (out x rank) of the second moment of its frozen layer's outputs.

    Over the tokens of every request: padding does not count, and what the requests share counts once for each of them,
    so their common beginning is not read apart.
    """
    moments: dict[str, Tensor] = {}
    whole = replace(reader, share=False)
    for start in range(0, len(rows), at_once):
        tokens = whole.batch(rows[start : start + at_once]).tokens
        with _outputs_of(model, tokens.mask.bool(), moments):
            prefix.read(model, tokens, logits_to_keep=1)
    return {name: torch.linalg.eigh(moment)[1][:, -rank:].contiguous() for name, moment in moments.items()}


@contextmanager
def _outputs_of(model: nn.Module, used: Tensor, moments: dict[str, Tensor]) -> Iterator[None]:
    """Inside, add ``Y^T Y`` of every adapted layer, ``Y = X W^T`` without bias, where ``used`` (rows x positions)."""
    handles = []
    for name, module in adapted(model).items():

        def record(layer: Any, _: Any, output: Tensor, key: str = name) -> None:
            Y = output.detach()[used.to(output.device)].float()
            Y = Y if getattr(layer, "bias", None) is None else Y - layer.bias.detach().float()
            moments[key] = moments.get(key, 0) + Y.T @ Y

        handles.append(module.get_base_layer().register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_lora(model: nn.Module) -> None:
    """Raises: GuardError: where nothing is adapted."""
    if not adapted(model):
        raise GuardError("SaLoRA is defined for LoRA only", fix="add --use_peft, or choose another guard")


def constrain(model: nn.Module, features: dict[str, Tensor]) -> None:
    """Put C on every B."""
    require_lora(model)
    modules = adapted(model)
    for name, V in features.items():
        parametrize.register_parametrization(modules[name].lora_B["default"], "weight", Complement(V))


def fold(model: nn.Module) -> None:
    """Make C part of every B: afterwards the adapter is an ordinary one."""
    for module in adapted(model).values():
        parametrize.remove_parametrizations(module.lora_B["default"], "weight", leave_parametrized=True)


def adapted(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by their module name."""
    return {name: m for name, m in model.named_modules() if "default" in getattr(m, "lora_B", {})}
