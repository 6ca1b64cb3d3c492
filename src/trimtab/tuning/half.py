"""Training in float16: what a gradient scaler leaves to the optimizer, and the anchors' gradient without underflow.

Covered: the loss scale of the anchors' own backward pass, gradients that a fused optimizer would unscale itself, steps
that it skips itself. Not covered: FSDP2, where the anchors' gradient is taken at scale 1 (one graph, one backward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trimtab.errors import GuardError
from trimtab.gradients.factors import Record, SafetyGradient, safety_gradient
from trimtab.gradients.sharding import scalar

#: Scales of the anchors' loss, tried from the largest on. At scale 1 everything below 6e-8 becomes zero on its way
#: through the layers: most of the gradient of anchors that the model says nearly surely.
SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0)
_active: ContextVar[bool] = ContextVar("float16", default=False)

Found = TypeVar("Found")


def computes_in_half(model: nn.Module, autocast: torch.dtype | None) -> bool:
    """Whether backward passes of this model go through float16: by autocast, by its weights, or by 4-bit layers."""
    dtypes: set[torch.dtype | None] = {parameter.dtype for parameter in model.parameters()}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # bitsandbytes' 4-bit layers
    return torch.float16 in dtypes | {autocast}


@contextmanager
def half_precision(active: bool) -> Iterator[None]:
    """Inside, gradients of the anchors are taken at a loss scale, if ``active``."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def dense_gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of the parameters that ``loss`` reaches; ``.grad`` stays as it is."""

    def at(scale: float) -> dict[str, Tensor]:
        weights = loss.new_full(loss.shape, scale)
        found = torch.autograd.grad(
            loss, list(parameters.values()), weights, allow_unused=True, retain_graph=scale > 1
        )  # the graph stays for a smaller scale, should this one overflow
        return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    if not _active.get():
        return at(1.0)
    scale, gradients = _largest_finite(at, lambda found: found.values())
    return {name: gradient.float() / scale for name, gradient in gradients.items()}


def factored_gradient(model: nn.Module, loss_of: Callable[[], Tensor]) -> SafetyGradient:
    """``safety_gradient``; where a scale overflows, ``loss_of`` is called again."""
    if not _active.get():
        return safety_gradient(model, loss_of)
    scale, found = _largest_finite(lambda scale: safety_gradient(model, lambda: scale * loss_of()), _blocks)
    return _unscaled(found, scale)


def recorded_gradient(record: Record, loss: Tensor) -> SafetyGradient:
    """``record.gradient``; the graph stays for a smaller scale, should one overflow."""
    if not _active.get():
        return record.gradient(loss)
    scale, found = _largest_finite(lambda scale: record.gradient(loss, scale, retain_graph=scale > 1), _blocks)
    return _unscaled(found, scale)


def _unscaled(found: SafetyGradient, scale: float) -> SafetyGradient:
    factored = {name: replace(both, D=both.D / scale) for name, both in found.factored.items()}
    dense = {name: block / scale for name, block in found.dense.items()}
    return SafetyGradient(found.loss / scale, factored, dense)


def _blocks(gradient: SafetyGradient) -> list[Tensor]:
    return [*gradient.dense.values(), *(part for both in gradient.factored.values() for part in (both.D, both.X))]


def _largest_finite(at: Callable[[float], Found], blocks: Callable[[Found], Iterable[Tensor]]) -> tuple[float, Found]:
    for scale in SCALES:
        found = at(scale)
        if all(bool(block.isfinite().all()) for block in blocks(found)):
            return scale, found
    fix = "train in bf16 or float32, or lower the learning rate"
    raise GuardError("the anchors' gradient is not finite in float16, at any loss scale", seen=list(SCALES), fix=fix)


def will_skip(optimizer: Any) -> bool:
    """Whether a fused optimizer was told that a gradient overflowed: its ``step`` runs and changes nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and scalar(found) > 0


@torch.no_grad()
def unscale(optimizer: Any, options: Mapping[str, Any]) -> None:
    """Unscale the gradients where a gradient scaler left that to a fused optimizer, which then does not do it again.

    ``options``: the keyword arguments of its ``step``.

    Raises:
        GuardError: for float16 gradients, where small values would be lost, and for optimizers that are handed the
            scaler itself.
    """
    if options.get("grad_scaler") is not None:
        fix = "call scaler.unscale_(optimizer) before scaler.step(optimizer), or use a torch.optim optimizer"
        raise GuardError("this optimizer unscales gradients by itself", seen=type(optimizer).__name__, fix=fix)
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()  # as GradScaler.unscale_
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if parameter.grad.dtype == torch.float16:
            fix = "train float32 weights under float16 autocast, or use bf16"
            raise GuardError(
                "float16 gradients cannot be unscaled without loss", seen=type(optimizer).__name__, fix=fix
            )
        parameter.grad.mul_(inverse.to(parameter.grad.device))
    optimizer.grad_scale = None
