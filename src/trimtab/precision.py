"""Where bfloat16 is used for training, and where not.

Covered: whether this machine computes in bfloat16 natively, and the scope that does so; frozen weights held in it
while adapters train on a CPU; widening what sums are taken of. Not covered: the type that weights are loaded in
(``models.py``) and TRL's own flags (``tuning/sft.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions; without them it is many times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_scope(device: torch.device, bf16: bool | None) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or nothing; enter it anew for every step.

    Args:
        device: where the model is.
        bf16: None: where the device computes in bfloat16 natively. Weights stay as they are.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if _chosen(device, bf16) else nullcontext()


def _chosen(device: torch.device, bf16: bool | None) -> bool:
    if bf16 is not None:
        return bf16
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_bfloat16()


@contextmanager
def adapters_train(model: Any, device: torch.device, bf16: bool | None) -> Iterator[None]:
    """Around many steps that train adapters on a CPU in bfloat16: the same products with less work; else nothing.

    Three things, each measured on a processor with bfloat16 instructions: attention is written out, since PyTorch's
    fused backward in bfloat16 is slow there; PEFT does not widen inputs that autocast narrows again; weights of linear
    maps that are not trained are held in bfloat16, where autocast would cast them anew at every pass (they take half
    their float32 size beside them meanwhile). Weights and attention are as before afterwards.

    Args:
        model: a PEFT model, or any other; ``device`` and ``bf16`` as in ``training_scope``.
    """
    if device.type != "cpu" or not _chosen(device, bf16):
        yield
        return
    from peft import PeftModel
    from peft.helpers import disable_input_dtype_casting

    with ExitStack() as stack:
        if isinstance(model, PeftModel):
            stack.enter_context(disable_input_dtype_casting(model))
        stack.enter_context(_written_out(model.get_base_model() if isinstance(model, PeftModel) else model))
        stack.enter_context(_frozen_narrowed(model))
        yield


@contextmanager
def _written_out(base: Any) -> Iterator[None]:
    before = base.config._attn_implementation
    if before != "sdpa":
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def _frozen_narrowed(model: nn.Module) -> Iterator[None]:
    """New parameters in place of the frozen ones, so that an embedding tied to the output layer stays as it is."""
    kept = {
        module: module.weight
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.requires_grad
    }
    for module, weight in kept.items():
        module.weight = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in kept.items():
            module.weight = weight


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened to float32; float32 and float64 as they are; any shape, differentiable."""
    return values if values.dtype.itemsize >= 4 else values.float()


def without_graph(model: nn.Module) -> AbstractContextManager[object]:
    """Forward passes that no backward follows: inference mode, or merely no graph where DeepSpeed gathers parameters.

    What it gathers in inference mode, and keeps, no later backward could go through.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return torch.no_grad() if partitioned else torch.inference_mode()
