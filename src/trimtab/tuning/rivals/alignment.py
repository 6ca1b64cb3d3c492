"""LoRA modules by name, and what alignment changed in each of their weights (``V = W_aligned - W_base``).

Covered: pairing by parameter name (never by order of iteration), shapes checked, an unaligned model that is the aligned
one refused. Not covered: what the difference is used for (``asft.py``, ``posthoc.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from trimtab.errors import GuardError, UsageError


class LoraModule(NamedTuple):
    """An adapted linear layer: ``name`` in the base model, frozen ``W`` (out x in), ``A`` (r x in), ``B`` (out x r)."""

    name: str
    W: Tensor
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


def lora_modules(model: nn.Module, adapter: str = "default") -> list[LoraModule]:
    """The adapted linear layers of a PEFT model, by the name that their weight has without PEFT."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in getattr(module, "lora_A", {}):
            plain = name.removeprefix("base_model.model.") + ".weight"
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            found.append(LoraModule(plain, module.get_base_layer().weight, A, B, float(module.scaling[adapter])))
    return found


def base_state(name: str) -> dict[str, Tensor]:
    """Parameters of the model before its alignment.

    Raises:
        UsageError: when none is named.
    """
    from trimtab import models

    if not name:
        raise UsageError(
            "this method needs the model before its alignment", fix="name it: --guard_base NAME (demo-unaligned)"
        )
    return {key: value.detach() for key, value in models.load(name, require_chat=False).model.named_parameters()}


def alignment_deltas(modules: Sequence[LoraModule], base: str) -> dict[str, Tensor]:
    """``W_aligned - W_base`` (out x in, float32) of every module, by name.

    Raises:
        GuardError: when a name or a shape does not match, or nothing differs.
    """
    before = base_state(base)
    deltas = {}
    for module in modules:
        if module.name not in before or before[module.name].shape != module.W.shape:
            raise GuardError(f"{base} has no weight {module.name} of this shape", seen=tuple(module.W.shape))
        deltas[module.name] = module.W.detach().float().cpu() - before[module.name].float().cpu()
    if not any(bool(delta.any()) for delta in deltas.values()):
        raise GuardError("the model before alignment equals the aligned one", seen=base, fix="name the unaligned one")
    silent = [name for name, delta in deltas.items() if not bool(delta.any())]
    if silent:
        raise GuardError(
            f"alignment did not change {len(silent)} of {len(deltas)} adapted weights, so they have no direction",
            seen=silent[0],
            fix="adapt only what alignment changed: --lora_target_modules",
        )
    return deltas
