"""What differs where parameters are sharded: FSDP2, whose parameters and gradients are DTensors.

Covered: the anchors' gradient under FSDP2, inner products that every rank agrees on, Algorithm 1 on shards, rules that
cannot work on shards, a guard's state and the check of a saved model where both are sharded.
Not covered: DDP (the guard computes the same thing on every rank and needs nothing), DeepSpeed (``zero.py``), FSDP 1
(refused).

FSDP2 computes with gathered copies and hands the reduced gradient to ``.grad`` of the shards, so
``torch.autograd.grad`` with respect to a shard finds nothing: the anchors' gradient is taken by ``backward`` with the
task's gradient set aside. Every rank reads the same anchors, so the mean over ranks is the gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import GuardError
from trimtab.gradients.sharding import is_sharded, whole
from trimtab.gradients.subspace import basis_of_matrix
from trimtab.gradients.sums import dot, squared_norm
from trimtab.gradients.surgery import Surgery, full_precision_matmul, project_out, remove_direction

#: Rules that would be wrong on shards or are not known to be right, and why; ``require_shardable`` refuses them.
UNSHARDABLE = {
    "per-tensor": "it is not shown to equal one process",
    "asft": "its penalty multiplies whole matrices with LoRA's factors",
}


def require_shardable(rule: Any, parameters: Mapping[str, Tensor]) -> None:
    """Refuse, before the first step, what would be wrong where parameters are sharded; nothing where they are not.

    Raises:
        GuardError: for such a rule or option.
    """
    if not any(is_sharded(parameter) for parameter in parameters.values()):
        return
    if rule.name in UNSHARDABLE:
        seen = f"{rule.name}: {UNSHARDABLE[rule.name]}"
        raise GuardError("this rule does not work under FSDP2", seen=seen, fix="train with DDP, or use another rule")
    every = getattr(rule, "refresh_every", 1)
    if every > 1:
        fix = "leave refresh_every at 1, or train with DDP"
        raise GuardError("under FSDP2 the safety gradient is taken anew at every step", seen=every, fix=fix)


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


class Fresh:
    """Around an anchor pass: it begins with what the shards hold now. May be entered again and again, as autocast.

    A rule may move the parameters between two of its passes (``keel`` does, when it settles); what an earlier pass
    without a backward has gathered would be read again.
    """

    def __init__(self, model: nn.Module, inner: AbstractContextManager[object]) -> None:
        self._model, self._inner = model, inner

    def __enter__(self) -> object:
        reshard(self._model)
        return self._inner.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._inner.__exit__(*raised)


@torch.no_grad()
def gather_once(model: nn.Module) -> None:
    """Let FSDP2 make its buffers for gathered parameters; nothing where the model is not sharded.

    It makes them in the first forward pass. Where that is a generation they are tensors of inference mode, and the
    first backward of training fails.
    """
    if hasattr(model, "reshard"):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        reshard(model)


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


def spf_on_shards(task: dict[str, Tensor], anchor: dict[str, Tensor], rank: int) -> Surgery:
    """SPF Algorithm 1 in place on sharded gradients; says what was done and leaves ``gradients`` empty.

    The branch is taken on the reduced inner product, the same on every rank. A block is gathered, projected with a
    dense SVD and cut again, one at a time: memory for two whole blocks, time for their SVDs on every rank. Exact, not
    cheap.

    Raises:
        GuardError: when nothing is shared or a gradient is not finite.
    """
    shared = [name for name in task if name in anchor]
    if not shared:
        raise GuardError("task and anchors share no parameter, so the guard cannot act", fix="check what is trainable")
    conflict = sum(dot(task[name], anchor[name]) for name in shared)
    if not math.isfinite(conflict):
        raise GuardError("a gradient is not finite", seen=conflict, fix="lower the learning rate")
    norm = math.sqrt(squared_norm(task))
    cosine = conflict / max(norm * math.sqrt(squared_norm(anchor)), 1e-30)
    if conflict >= 0:
        return Surgery({}, conflict, cosine, removed=0.0, projected=0)
    with torch.no_grad(), full_precision_matmul():
        lost = [_project_block(task[name], whole(anchor[name]), rank) for name in shared]
    removed = math.sqrt(sum(value for value in lost if value is not None)) / max(norm, 1e-30)
    return Surgery({}, conflict, cosine, removed, projected=sum(value is not None for value in lost))


def cut_like(full: Tensor, sharded: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, placed as ``sharded``; nothing is communicated."""
    if not is_sharded(sharded):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = sharded.device_mesh, sharded.placements  # type: ignore[attr-defined]
    held = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return held.redistribute(placements=placements)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A rule's state with whole tensors in place of shards, on the CPU; every process calls it."""
    return {name: _whole_on_cpu(value) if is_sharded(value) else value for name, value in tensors.items()}


def placed(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stored state, cut as the parameters are: the part after the first dot of a key may name one of them."""

    def cut(key: str, value: Tensor) -> Tensor:
        like = parameters.get(key.partition(".")[2])
        if like is None or not is_sharded(like) or value.shape != like.shape:
            return value
        return cut_like(value.to(like.device), like)

    return {key: cut(key, value) for key, value in tensors.items()}


class Difference(NamedTuple):
    """The saved tensor that is furthest from its trained one, relative to the largest value of that tensor."""

    relative: float
    name: str


def saved_difference(trained: nn.Module, saved: nn.Module | None) -> Difference:
    """Compare a sharded model with what was saved of it, one gathered tensor at a time.

    No process could run the saved model beside its shard on one device, and a forward pass of the sharded one needs
    all of them: the tensors are compared instead. Every process calls it.

    Args:
        trained: sharded. Of a PEFT model only what was trained is saved, and compared.
        saved: the reloaded model on the CPU; None on all processes but the one that compares.
    """
    from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names  # takes off compile's and checkpointing's wrappers

    found = [Difference(0.0, "")]
    kept = dict(saved.named_parameters()) if saved is not None else {}
    for name, parameter in fsdp2_canonicalize_names(dict(trained.named_parameters())).items():
        if hasattr(trained, "peft_config") and not parameter.requires_grad:
            continue
        mine = _whole_on_cpu(parameter.detach()).float()
        if saved is None:
            continue
        apart = math.inf  # missing or of another shape; the loop goes on, for the others gather with it
        if name in kept and kept[name].shape == mine.shape:
            apart = float((mine - kept[name].detach().float()).abs().max()) / max(float(mine.abs().max()), 1e-30)
        found.append(Difference(apart if math.isfinite(apart) else math.inf, name))
    return max(found)


def _whole_on_cpu(tensor: Tensor) -> Tensor:
    if is_sharded(tensor):  # a state that waits on the CPU is gathered where the processes talk to each other
        tensor = whole(tensor.to(tensor.device_mesh.device_type))  # type: ignore[attr-defined]
    return tensor.cpu()


def _project_block(task: Tensor, anchor: Tensor, rank: int) -> float | None:
    """Project one block in place; the squared norm that it lost, or None where the anchors do not reach it."""
    basis = basis_of_matrix(anchor, rank)
    if basis.U.shape[1] == 0:
        return None
    gradient = whole(task)
    rows = gradient.shape[0] if gradient.ndim else 1
    deletes = basis.U.shape[1] >= rows and gradient.numel() > 1
    left = remove_direction(gradient, anchor) if deletes else project_out(gradient, basis.U)
    task.copy_(cut_like(left.kept.to(gradient.dtype), task))
    return left.removed
