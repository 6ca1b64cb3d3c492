"""AsFT (arXiv 2506.08473): LoRA held near the direction that alignment moved each weight in.

    L = L_task + lambda * sum_m ||(I - C_m) B_m A_m||_F^2        C = V V^T / ||V||_F,   V = W_aligned - W_base

Covered: the penalty and its gradient in closed form, without building C (out x out) or B A. Not covered: full
fine-tuning, where the source defines nothing. As in the authors' code the LoRA scaling is left out; the penalty
is added once per update (there: once per micro-step, undivided).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError
from trimtab.tuning.pools import AnchorPool, AnchorReader
from trimtab.tuning.rivals.alignment import LoraModule, alignment_deltas, lora_modules
from trimtab.tuning.rules import Report, Step, add_gradient


class Penalty(NamedTuple):
    """``value`` and its gradients with respect to B (out x r) and A (r x in)."""

    value: Tensor
    B: Tensor
    A: Tensor


def apply_c(V: Tensor, M: Tensor) -> Tensor:
    """``C M`` with ``C = V V^T / ||V||_F``; V out x in, M out x k."""
    result: Tensor = V @ (V.T @ M) / V.norm()
    return result


def penalty(V: Tensor, B: Tensor, A: Tensor) -> Penalty:
    """``||(I - C) B A||_F^2``: with ``R = B - C B`` it is ``tr(R^T R A A^T)``.

    dB = 2 (I - C) R (A A^T),  dA = 2 (R^T R) A.   C is symmetric.
    """
    R = B - apply_c(V, B)
    gram, outer = R.T @ R, A @ A.T  # both r x r
    dB = 2 * (R - apply_c(V, R)) @ outer
    return Penalty((gram * outer).sum(), dB, 2 * gram @ A)


@dataclass
class AsftRule:
    """AsFT's penalty at every step; needs the model before its alignment (``base``).

    Attributes:
        base: name of the unaligned model, as in every verb; "" raises.
        weight: lambda, the paper's 1.
    """

    base: str = ""
    weight: float = 1.0
    name: str = "asft"
    decision_tokens: int | None = None

    def __post_init__(self) -> None:
        self._deltas: dict[str, Tensor] = {}
        self._modules: list[LoraModule] = []

    def default_anchors(self) -> SafetyAnchors:
        """None: the constraint is on weights."""
        return SafetyAnchors(anchors=(), origin="none")

    def prepare(self, reader: AnchorReader, pools: dict[Side, AnchorPool]) -> None:  # noqa: ARG002 - it has none
        self._load(reader.model)

    def _load(self, model: torch.nn.Module) -> None:
        self._modules = lora_modules(model)
        if not self._modules:
            raise GuardError("AsFT is defined for LoRA only", fix="add --use_peft, or choose another guard")
        self._deltas = alignment_deltas(self._modules, self.base)

    def step(self, step: Step) -> Report:
        if not self._modules:  # resumed: the constraint is a function of the two checkpoints
            self._load(step.reader.model)
        total = 0.0
        for module in self._modules:
            B, A = module.B.detach().float(), module.A.detach().float()
            found = penalty(self._deltas[module.name].to(B.device), B, A)
            total += float(found.value)
            add_gradient(module.B, found.B, self.weight)
            add_gradient(module.A, found.A, self.weight)
        return Report(anchor_loss={"penalty": total}, acted=("penalty",) if total > 0 else ())

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []
