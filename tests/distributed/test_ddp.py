"""DDP on two gloo processes against one process: same decisions, same parameters, replicas bit-identical."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from trimtab.tuning.guard import SafetyGuard

STEPS = 10


def _rows() -> torch.Tensor:
    return torch.randint(4, 30, (STEPS, 4, 10), generator=torch.Generator().manual_seed(3))


def _run(rank: int, world: int, rule: str, folder: str, bucket_view: bool) -> None:
    torch.set_num_threads(1)
    loaded = tiny_model()
    model: torch.nn.Module = loaded.model
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["TRIMTAB_TEST_PORT"])
        dist.init_process_group("gloo", rank=rank, world_size=world)
        model = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"rank": 2} if rule == "spf" else {}
    guard = SafetyGuard(loaded, ANCHORS, rule, model=model, **options)
    with guard.attach(optimizer):
        for batch in _rows():
            part = batch.chunk(world)[rank]
            model(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    torch.save(
        {"state": state, "acted": [report.acted for report in guard.history]}, Path(folder) / f"{world}-{rank}.pt"
    )
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize(("rule", "bucket_view"), [("keel", False), ("keel", True), ("spf", False)])
def test_two_processes_equal_one(rule: str, bucket_view: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(29500 + os.getpid() % 400 + 7 * bucket_view))
    _run(0, 1, rule, str(tmp_path), bucket_view)
    mp.spawn(_run, args=(2, rule, str(tmp_path), bucket_view), nprocs=2)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert first["acted"] == second["acted"] == one["acted"]
    assert any(one["acted"])
    for name, tensor in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), f"replicas differ in {name}"
        torch.testing.assert_close(first["state"][name], tensor, atol=1e-4, rtol=1e-3)
