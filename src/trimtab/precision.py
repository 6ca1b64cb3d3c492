"""Where bfloat16 is used for training, and where not.

Covered: whether this machine computes in bfloat16 natively, and the scope that does so; widening what sums are taken
of. Not covered: the type that weights are loaded in (``models.py``) and TRL's own flags (``tuning/sft.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
    if bf16 is None:
        bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_bfloat16()
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened to float32; float32 and float64 as they are; any shape, differentiable."""
    return values if values.dtype.itemsize >= 4 else values.float()


def without_graph(model: nn.Module) -> AbstractContextManager[object]:
    """Forward passes that no backward follows: inference mode, or merely no graph where DeepSpeed gathers parameters.

    What it gathers in inference mode, and keeps, no later backward could go through.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return torch.no_grad() if partitioned else torch.inference_mode()
