"""Right gradients through bitsandbytes' 4-bit layers on a CPU.

On a processor with bfloat16 instructions such a layer repacks its weights at the first pass in eval mode without
gradient, and its backward pass reads the repacked bytes as if they were in their first order (bitsandbytes 0.50.2).
The gradients are then wrong without an error: of another size and sign. Anything that looks at a model and trains it
in turn walks into this.

Covered: switching the repacking off and undoing it, before gradients are taken. Not covered: speed (an eval pass is
slower without it); 8-bit layers, which do not repack.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_order(model: nn.Module) -> int:
    """Store 4-bit weights in their first order from now on; the number of layers. Others are left alone."""
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        changed: Any = layer
        changed.support_avx512bf16_for_cpu = False
        if getattr(getattr(changed.weight, "quant_state", None), "packing_format_for_cpu", False):
            changed.state_dict()  # bitsandbytes' own way back: what it saves is always in the first order
    return len(layers)
