"""FSDP2 (DTensor) on two gloo processes against one process: same decisions, parameters within rounding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.test_ddp import STEPS, _rows
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from trimtab.gradients.sharding import is_sharded, whole
from trimtab.tuning.guard import SafetyGuard


def _run(rank: int, world: int, rule: str, folder: str) -> None:
    torch.set_num_threads(1)
    loaded = tiny_model()
    model: torch.nn.Module = loaded.model
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["TRIMTAB_TEST_PORT"], RANK=str(rank), WORLD_SIZE=str(world)
        )
        dist.init_process_group("gloo", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(is_sharded(parameter) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"rank": 2} if rule == "spf" else {}
    guard = SafetyGuard(loaded, ANCHORS, rule, model=model, **options)
    with guard.attach(optimizer):
        for batch in _rows():
            part = batch.chunk(world)[rank]
            model(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    state = {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    torch.save({"state": state, "acted": [r.acted for r in guard.history]}, Path(folder) / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["keel", "mixing", "spf", "a-gem"])
def test_two_sharded_processes_equal_one(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = ["keel", "mixing", "spf", "a-gem"].index(rule)
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(29920 + os.getpid() % 400 + 11 * offset))
    _run(0, 1, rule, str(tmp_path))
    mp.spawn(_run, args=(2, rule, str(tmp_path)), nprocs=2)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one["acted"]) >= STEPS and first["acted"] == second["acted"] == one["acted"]
    assert any(one["acted"])
    for name, tensor in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), f"ranks differ in {name}"
        torch.testing.assert_close(first["state"][name], tensor, atol=1e-4, rtol=1e-3)
