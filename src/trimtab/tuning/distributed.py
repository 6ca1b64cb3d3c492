"""What differs where parameters are sharded: FSDP2, whose parameters and gradients are DTensors.

Covered: the anchors' gradient under FSDP2, inner products that every rank agrees on, Algorithm 1 on shards.
Not covered: DDP (the guard computes the same thing on every rank and needs nothing), FSDP 1 and DeepSpeed (refused).

FSDP2 computes with gathered copies and hands the reduced gradient to ``.grad`` of the shards, so
``torch.autograd.grad`` with respect to a shard finds nothing: the anchors' gradient is taken by ``backward`` with the
task's gradient set aside. Every rank reads the same anchors, so the mean over ranks is the gradient itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trimtab.errors import GuardError
from trimtab.gradients.sharding import is_sharded, scalar, whole
from trimtab.gradients.subspace import basis_of_matrix
from trimtab.gradients.surgery import full_precision_matmul, project_out, remove_direction


def reshard(model: nn.Module) -> None:
    """Give the gathered parameters back; nothing where the model is not sharded.

    FSDP2's root keeps them after a forward pass and gives them back in the backward. An anchor pass without a backward
    would leave them there: the optimizer would move the shards, and the next forward pass read the old copy.
    """
    if not hasattr(model, "reshard"):
        return
    for module in model.modules():
        give_back = getattr(module, "reshard", None)
        if give_back is not None:
            give_back()


def gradients_by_backward(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of ``loss`` through ``backward``; ``.grad`` is as it was afterwards."""
    set_aside = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()
        return {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = set_aside[name]


def spf_sharded(task: dict[str, Tensor], anchor: dict[str, Tensor], rank: int) -> float:
    """SPF Algorithm 1 in place on sharded gradients; returns ``<g_task, g_anchor>``.

    The branch is taken on the reduced inner product, the same on every rank. A block is gathered, projected with a
    dense SVD and cut again, one at a time: memory for two whole blocks, time for their SVDs on every rank. Exact, not
    cheap.

    Raises:
        GuardError: when nothing is shared or a gradient is not finite.
    """
    shared = [name for name in task if name in anchor]
    if not shared:
        raise GuardError("task and anchors share no parameter, so the guard cannot act", fix="check what is trainable")
    conflict = sum(scalar((task[name].double() * anchor[name].double()).sum()) for name in shared)
    if not math.isfinite(conflict):
        raise GuardError("a gradient is not finite", seen=conflict, fix="lower the learning rate")
    if conflict < 0:
        with torch.no_grad(), full_precision_matmul():
            for name in shared:
                _project_block(task[name], whole(anchor[name]), rank)
    return conflict


def cut_like(full: Tensor, sharded: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, placed as ``sharded``; nothing is communicated."""
    if not is_sharded(sharded):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = sharded.device_mesh, sharded.placements  # type: ignore[attr-defined]
    held = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return held.redistribute(placements=placements)


def _project_block(task: Tensor, anchor: Tensor, rank: int) -> None:
    basis = basis_of_matrix(anchor, rank)
    if basis.U.shape[1] == 0:
        return
    gradient = whole(task)
    rows = gradient.shape[0] if gradient.ndim else 1
    deletes = basis.U.shape[1] >= rows and gradient.numel() > 1
    result = remove_direction(gradient, anchor) if deletes else project_out(gradient, basis.U)
    task.copy_(cut_like(result.to(gradient.dtype), task))
