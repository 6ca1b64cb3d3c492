"""FSDP2 (DTensor) on two gloo processes against one process: same decisions, parameters within rounding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed.loop import RULES, assert_equal_to_one, joined, save, train_guarded
from tests.tiny import tiny_model
from trimtab.gradients.sharding import is_sharded, whole


def _shard(model: torch.nn.Module, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(is_sharded(parameter) for parameter in model.parameters())


def _run(rank: int, world: int, rule: str, folder: str) -> None:
    with joined(rank, world):
        loaded = tiny_model()
        if world > 1:
            _shard(loaded.model, world)
        acted = train_guarded(loaded, loaded.model, rule, rank, world)
        state = {name: whole(parameter.detach()).clone() for name, parameter in loaded.model.named_parameters()}
        save(folder, rank, world, state, acted)


@pytest.mark.distributed
@pytest.mark.parametrize("rule", RULES)
def test_two_sharded_processes_equal_one(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = list(RULES).index(rule)
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(29920 + os.getpid() % 400 + 11 * offset))
    _run(0, 1, rule, str(tmp_path))
    mp.spawn(_run, args=(2, rule, str(tmp_path)), nprocs=2)
    assert_equal_to_one(tmp_path)
