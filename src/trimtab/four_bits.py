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
        restore_order(layer)
    on_cpu = [layer for layer in layers if next(layer.parameters()).device.type == "cpu"]
    if on_cpu and not (error := error_after_a_look(on_cpu[0])) <= TOLERATED:
        raise ModelError(
            "gradients through this model's 4-bit layers are wrong on this processor",
            seen=f"relative error {error:.2f} after a pass without gradient, bitsandbytes {_version()}",
            fix="install bitsandbytes 0.50.2, which is tested, or load the model without quantisation",
        )
    return len(layers)


def restore_order(layer: nn.Module) -> None:
    """Put a layer's repacked weights back into their first order, in which alone they can be unpacked.

    The next pass in eval mode repacks them, unless ``keep_order`` has switched that off. Nothing for other layers.
    """
    held: Any = layer
    if getattr(getattr(getattr(held, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        held.state_dict()  # bitsandbytes' own way back: what it saves is always in the first order


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer of bitsandbytes, of whatever version; PEFT's wrappers are not."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__
    )


def error_after_a_look(layer: nn.Module) -> float:
    """How wrong a linear layer becomes by a pass without gradient: the larger of two relative errors.

    ``|W' x - W x| / |W x|``, the product after that pass against the one before, and
    ``|<y, y> - <W'^T y, x>| / <y, y>`` with ``y = W' x``: the derivative comes from the backward pass and agrees with
    the forward pass for every x if it is right. The first would miss a wrong backward pass, the second one in which
    both passes are wrong alike.
    """
    linear: Any = layer
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0))  # rows x inputs
    was_training = layer.training
    layer.eval()
    before = _product(linear, x.clone().requires_grad_(True)).detach()  # 1 x outputs; bitsandbytes repacks none here
    with torch.no_grad():
        layer(x)  # but here
    x.requires_grad_(True)
    y = _product(linear, x)
    # No derivative at all is a wrong one: a repacked layer's product may have none.
    (back,) = torch.autograd.grad(y, [x], y.detach(), allow_unused=True) if y.requires_grad else (None,)
    layer.train(was_training)
    y, square = y.detach(), float(y.detach().square().sum())
    found = 0.0 if back is None else float((back.double() * x.detach().double()).sum())
    return max(float((y - before).norm() / before.norm()), abs(square - found) / square)


def _product(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """``W x``, without bias, in float64."""
    with torch.enable_grad():
        y: torch.Tensor = linear(x).double()
        return y if linear.bias is None else y - linear.bias.detach().double()


def _version() -> str:
    from importlib.metadata import version

    return version("bitsandbytes")
