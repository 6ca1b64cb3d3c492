"""Weights laid out for the processor while answers are written: fewer cache misses in products with a few rows.

Covered: plain float32 ``Linear`` layers on a CPU whose PyTorch has oneDNN, packed for the time of a ``with`` block;
hooks and adapters around them work as ever. Not covered: other layers, dtypes and devices (they run as they are),
training.

A product of 16 rows with a weight in row-major order spends most of its time on fetching the weight. oneDNN's blocked
layout takes half of that time (docs/results/throughput.md). The packed copy is as large as the weights, so a model
is packed only where a quarter of the free memory holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

MEMORY_SHARE = 4  # a packed copy may take one part in so many of the free memory


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[int]:
    """Plain linear layers multiply with packed weights inside the block; gives the number of them.

    The results differ from the unpacked ones by the order of summation only. Weights must not change inside the block.

    Args:
        model: any module; what it holds in layers that are not plain float32 on the CPU runs as before.
        rows: how many rows a product usually has; the layout is chosen for it, other numbers work too.
    """
    layers = _layers_to_pack(model)
    try:
        for layer in layers:
            layer.forward = _forward(layer, rows)  # type: ignore[method-assign]
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _layers_to_pack(model: nn.Module) -> list[nn.Linear]:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    needed = sum(layer.weight.nbytes for layer in layers)
    return layers if needed and needed * MEMORY_SHARE <= _free_memory() else []


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A ``Linear`` that nobody has replaced, subclassed, parametrised or given a ``forward`` of its own."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or type(layer.weight) is not nn.Parameter:
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and type(weight.data) is Tensor


def _forward(layer: nn.Linear, rows: int) -> Any:
    operations: Any = torch.ops.mkldnn  # what the compiler of PyTorch itself emits for frozen weights
    weight = operations._reorder_linear_weight(layer.weight.detach(), rows)  # out x in, in blocks

    def forward(given: Tensor) -> Tensor:
        if given.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return functional.linear(given, layer.weight, layer.bias)
        product: Tensor = operations._linear_pointwise(given, weight, layer.bias, "none", [], "")
        return product

    return forward


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
