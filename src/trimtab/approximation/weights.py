"""A linear map's weight as numbers, however its library keeps it: plain, packed in four or eight bits, or unknown.

A weight that is packed looks like a tensor of bytes; scales made from its bytes would be nonsense. So only floating
weights of the right shape are taken as they are.

Covered: PyTorch, PEFT around anything, bitsandbytes (4 and 8 bits), compressed-tensors (plain after a first pass), and
any other layer that is linear in its input (GPTQ, AWQ, ...): what it does to the unit vectors *is* its weight. Not
covered: layers that round their input coarsely; those fail the check and raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ApproximationError
from trimtab.four_bits import restore_order

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1024  # unit vectors at a time
AGREES = 0.05  # relative error of the read weight on random inputs: rounding of activations to 8 bits is 0.01
_FAILS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)  # of layers given what they do not take


def dense_weight(module: nn.Module) -> Tensor:
    """The weight (out x in) of a linear map, under any adapter.

    Raises:
        ApproximationError: a layer that no way of reading fits; names its class and what was tried.
    """
    layer: Any = getattr(module, "base_layer", module)
    weight: Any = getattr(layer, "weight", None)
    shape = (layer.out_features, layer.in_features)
    if is_plain(weight) and tuple(weight.shape) == shape:
        found: Tensor = weight.detach()
        return found
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        restore_order(layer)
        weight = layer.weight
        unpacked: Tensor = dequantize_bnb_weight(weight, getattr(layer, "state", None)).detach()
        if tuple(unpacked.shape) == shape:
            return unpacked
    return _from_unit_vectors(layer)


def is_plain(weight: object) -> bool:
    """A tensor of ordinary floating numbers (an 8-bit float needs its scale, a subclass may be packed)."""
    return isinstance(weight, Tensor) and weight.dtype in PLAIN and type(weight.detach()) is Tensor


@torch.no_grad()
def _from_unit_vectors(layer: Any) -> Tensor:
    reasons = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # packed kernels may take one type only
        try:
            return _read(layer, dtype)
        except _FAILS as error:
            reasons.append(f"{dtype}: {' '.join(str(error).split())[:120]}")
    held = getattr(layer, "weight", None)
    what = f"weight {tuple(held.shape)} of {held.dtype}" if isinstance(held, Tensor) else "no tensor named weight"
    raise ApproximationError(
        "the weights of a layer cannot be read as numbers, and this technique makes its scales from them; looked for a "
        "floating weight (out x in), one packed by bitsandbytes, and a layer that is linear in its input",
        seen=f"{type(layer).__module__}.{type(layer).__name__} with {what}; {'; '.join(reasons)}",
        fix="take a technique that reads no weights (a8, a4, kv8, teal:0.5), or name the unquantised model",
    )


def _read(layer: Any, dtype: torch.dtype) -> Tensor:
    """The images of the unit vectors less that of zero (the bias), checked on random inputs.

    Raises:
        ValueError: it is not linear. Others: as the layer.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    device, width = (tensors[0].device if tensors else torch.device("cpu")), layer.in_features
    bias = layer(torch.zeros(1, width, dtype=dtype, device=device)).float()
    parts = []
    for start in range(0, width, CHUNK):
        units = torch.zeros(min(CHUNK, width - start), width, dtype=dtype, device=device)
        units[torch.arange(len(units)), start + torch.arange(len(units))] = 1.0
        parts.append(layer(units).float() - bias)
    weight = torch.cat(parts).T  # out x in
    if weight.shape != (layer.out_features, width):
        raise ValueError(f"it gives {weight.shape[0]} values, not {layer.out_features}")
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)
    seen = layer(x).float() - bias
    gap = float((x.float() @ weight.T - seen).norm() / seen.norm().clamp_min(1e-12))
    if not gap < AGREES:
        raise ValueError(f"it is not linear in its input (relative gap {gap:.2g})")
    return weight
