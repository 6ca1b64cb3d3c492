"""DDP on two gloo processes against one process: same decisions, same parameters, replicas bit-identical.

A raw loop; the command line under torchrun and ``accelerate launch`` is in ``test_launched.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.loop import CASES, assert_equal_to_one, free_port, joined, model_of, save, train_guarded


def _run(rank: int, world: int, name: str, folder: str, bucket_view: bool) -> None:
    with joined(rank, world):
        loaded = model_of(CASES[name])
        model: torch.nn.Module = loaded.model
        if world > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        acted = train_guarded(loaded, model, CASES[name], rank, world, Path(folder))
        state = {key: tensor.clone() for key, tensor in loaded.model.state_dict().items()}
        save(folder, rank, world, state, acted)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rule", "bucket_view"), [("keel", False), ("keel", True), ("keel-glances", False), ("spf", False)]
)
def test_two_processes_equal_one(rule: str, bucket_view: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(free_port()))
    _run(0, 1, rule, str(tmp_path), bucket_view)
    mp.spawn(_run, args=(2, rule, str(tmp_path), bucket_view), nprocs=2)
    assert_equal_to_one(tmp_path, CASES[rule].tolerance)
