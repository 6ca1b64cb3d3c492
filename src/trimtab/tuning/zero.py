"""DeepSpeed ZeRO, stages 1 to 3: the guard acts inside the engine's own step, on what the engine has partitioned.

The engine updates inside ``backward`` as Accelerate calls it, and keeps gradients and float32 parameters in partitions
of its own, so a hook on a torch optimizer would see nothing that matters. Its ZeRO optimizer's ``step`` is called once
per real update, after accumulation and reduction: there the guard looks. Task gradients and float32 parameters are
gathered only when a rule asks for them, which is when it corrects.

Covered: ``keel`` and ``keel-patient``, float32 and bfloat16, LoRA and full, the correction after the last update, which
goes into the model's own copies as well. Not covered: other rules (refused), float16 (refused), pipeline and tensor
parallelism, parameters or optimizer offloaded to disk.

Gradient clipping: the engine clips after the guard, everywhere else the trainer clips before it. A projection does not
depend on the length of a gradient, and a correction of the parameters is not clipped either way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import GuardError
from trimtab.precision import at_least_float32
from trimtab.tuning.rules import Step

RULES = ("keel", "keel-patient")  # others write ``p.grad`` or step the optimizer themselves

COMPILES_WITHIN = 600.0  # seconds; the engine's own parts take a few tens


def left_locks() -> list[Path]:
    """Locks of compilations that seem to have been cut off: PyTorch waits for one to go away, silently, for ever.

    Where its extensions are compiled: ``TORCH_EXTENSIONS_DIR`` or its default.
    """
    from torch.utils.cpp_extension import get_default_build_root

    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in place.glob(pattern)]
    return sorted(lock for lock in locks if time.time() - lock.stat().st_mtime > COMPILES_WITHIN)


def zero_optimizer(optimizer: Any) -> Any | None:
    """The engine's ZeRO (or bfloat16) optimizer under Accelerate's wrappers; None where there is none."""
    while optimizer is not None:
        kind = type(optimizer)
        if kind.__module__.startswith("deepspeed.") and hasattr(optimizer, "step") and not _is_torch(optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None) if not _is_torch(optimizer) else None
    return None


def _is_torch(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "accelerator_state")


def require_zero(rule: Any, parameters: Mapping[str, Tensor]) -> None:
    """Refuse, before the first step, what would be wrong.

    Raises:
        GuardError: for a rule that is not keel's; for float16, whose gradients are still scaled inside the step; where
            the engine keeps no float32 parameters that can be asked for (bfloat16 under stage 0).
    """
    from deepspeed.utils import safe_get_full_fp32_param

    if rule.name not in RULES:
        fix = f"use one of {', '.join(RULES)}, or train with DDP or FSDP2"
        why = "it changes gradients in place, and the engine keeps its own"
        raise GuardError("this rule does not work under DeepSpeed ZeRO", seen=f"{rule.name}: {why}", fix=fix)
    if any(parameter.dtype == torch.float16 for parameter in parameters.values()):
        raise GuardError("the guard does not work under DeepSpeed in float16", fix='set "bf16": {"enabled": true}')
    name, parameter = next(iter(parameters.items()))
    if safe_get_full_fp32_param(parameter) is None:
        fix = '"zero_optimization": {"stage": 1}, or 2 or 3'
        raise GuardError("DeepSpeed gives no float32 copy of a trained parameter", seen=name, fix=fix)


class ZeroHandle:
    """Around the optimizer's ``step``: ``before`` runs at its beginning. ``remove`` puts the old one back."""

    def __init__(self, optimizer: Any, before: Callable[[], None]) -> None:
        self._optimizer, own = optimizer, optimizer.step
        self._own = own if "step" in vars(optimizer) else None  # somebody else's wrapper, not the class's

        def step(*args: Any, **kwargs: Any) -> Any:
            before()
            return own(*args, **kwargs)

        optimizer.step = step

    def remove(self) -> None:
        if self._own is None:
            del self._optimizer.step  # the class has its own
        else:
            self._optimizer.step = self._own


@dataclass
class ZeroStep(Step):
    """A step whose gradients and parameters lie in the engine's partitions.

    Attributes:
        settling: after the last update: there are no task gradients, and the model's own copies are written as well
            (before an update they need not be: the update overwrites them with its float32 parameters).
    """

    settling: bool = False
    _task: dict[str, Tensor] | None = field(default=None, repr=False)
    _values: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        """No: the engine may hold a part of each."""
        return False

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Task gradients, whole, reduced over the ranks; what a rule changes in them is written back by ``close``."""
        if self._task is None:
            from deepspeed.utils import safe_get_full_grad

            found = {} if self.settling else {name: safe_get_full_grad(p) for name, p in self.parameters.items()}
            self._task = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
            if not self._task and not self.settling:
                raise GuardError("DeepSpeed gives no gradient inside its step", seen=f"{len(found)} trained parameters")
        return self._task

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The float32 parameters, whole; written back by ``moved``."""
        if self._values is None:
            from deepspeed.utils import safe_get_full_fp32_param

            found = {name: safe_get_full_fp32_param(p) for name, p in self.parameters.items()}
            self._values = {name: at_least_float32(value).clone() for name, value in found.items()}
        return self._values

    @torch.no_grad()
    def moved(self) -> None:
        """Write the values into the engine's partitions, and after the last update into the model."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in (self._values or {}).items():
            safe_set_full_fp32_param(self.parameters[name], value)
            if self.settling:
                _place(self.parameters[name], value)

    def close(self) -> None:
        """Write the task gradients back, if they were asked for."""
        from deepspeed.utils import safe_set_full_grad

        for name, gradient in (self._task or {}).items():
            safe_set_full_grad(self.parameters[name], gradient)


def _place(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Into the model's copy: whole on every rank, or this rank's part of it (stage 3), or both where it is gathered."""
    part, group = getattr(parameter, "ds_tensor", None), getattr(parameter, "ds_process_group", None)
    if part is not None:
        begin = torch.distributed.get_rank(group) * part.numel()
        mine = value.flatten()[begin : begin + part.numel()]  # the last part is filled up
        part.data.view(-1)[: mine.numel()].copy_(mine)  # a view or an error, never a copy that is lost
    if parameter.shape == value.shape:
        parameter.copy_(value)
