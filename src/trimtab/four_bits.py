"""Right gradients through bitsandbytes' 4-bit layers on a CPU.

On a processor with bfloat16 instructions such a layer repacks its weights at the first pass in eval mode without
gradient, and its backward pass reads the repacked bytes as if they were in their first order (bitsandbytes 0.50.2).
The gradients are then wrong without an error: of another size and sign. Anything that looks at a model and trains it
in turn walks into this.

Covered: switching the repacking off and undoing it, before gradients are taken; a check that the gradient is right
afterwards, so that a version of bitsandbytes in which this module's cure does nothing is refused instead of believed.
Not covered: speed (an eval pass is slower without it); 8-bit layers, which do not repack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.errors import ModelError

SWITCH = "support_avx512bf16_for_cpu"  # bitsandbytes' name for it
TOLERATED = 0.05  # relative; bfloat16 rounding stays below 0.01, a repacked weight is wrong by its own size


def keep_order(model: nn.Module) -> int:
    """Store 4-bit weights in their first order from now on; the number of layers. Others are left alone.

    Raises:
        ModelError: when the gradient through such a layer on a CPU is wrong all the same.
    """
    layers = [module for module in model.modules() if is_four_bit(module)]
    for layer in layers:
        changed: Any = layer
        if hasattr(layer, SWITCH):
            setattr(changed, SWITCH, False)
        if getattr(getattr(changed.weight, "quant_state", None), "packing_format_for_cpu", False):
            changed.state_dict()  # bitsandbytes' own way back: what it saves is always in the first order
    on_cpu = [layer for layer in layers if next(layer.parameters()).device.type == "cpu"]
    if on_cpu and not (error := transpose_error(on_cpu[0])) <= TOLERATED:
        raise ModelError(
            "gradients through this model's 4-bit layers are wrong on this processor",
            seen=f"relative error {error:.2f} after a pass without gradient, bitsandbytes {_version()}",
            fix="install bitsandbytes 0.50.2, which is tested, or load the model without quantisation",
        )
    return len(layers)


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer of bitsandbytes, of whatever version; PEFT's wrappers are not."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__
    )


def transpose_error(layer: nn.Module) -> float:
    """How wrong a linear layer's backward pass is after a look: |<y, W x> - <W^T y, x>| / <y, W x> with y = W x.

    ``W x`` comes from the forward pass, ``W^T y`` from the backward pass; for a right gradient they agree for every x.
    """
    linear: Any = layer
    was_training = layer.training
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0))  # rows x inputs
    layer.eval()
    with torch.no_grad():
        layer(x)  # where bitsandbytes repacks
    layer.train(was_training)
    with torch.enable_grad():
        x.requires_grad_(True)
        y = layer(x).float()  # rows x outputs
        y = y if linear.bias is None else y - linear.bias.detach().float()
        (back,) = torch.autograd.grad(y, [x], y.detach())
    expected = y.detach().double().square().sum()
    return float((expected - (back.double() * x.detach().double()).sum()).abs() / expected)


def _version() -> str:
    from importlib.metadata import version

    return version("bitsandbytes")
