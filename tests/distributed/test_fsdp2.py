"""FSDP2 (DTensor) on two gloo processes against one process: same decisions, parameters within rounding.

A raw loop; the command line under ``accelerate launch`` is in ``test_launched.py``. The two processes are started once
and go through everything: most of a run's time is their imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.loop import CASES, Case, assert_equal_to_one, free_port, joined, model_of, save, train_guarded
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from trimtab.errors import GuardError, TrimtabError
from trimtab.gradients.factors import SafetyGradient
from trimtab.gradients.sharding import is_sharded, whole
from trimtab.gradients.surgery import spf_algorithm1
from trimtab.models import LoadedModel
from trimtab.tuning.distributed import cut_like, spf_on_shards
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.saving import verify_saved

REFUSED = {
    "per-tensor": Case("per-tensor"),
    "asft": Case("asft", {"base": "none"}, lora=True),
    "spf-refresh": Case("spf", {"refresh_every": 2}),
}
pytestmark = pytest.mark.distributed


def _shard(loaded: LoadedModel, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in [m for m in loaded.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer, mesh=mesh)
    fully_shard(loaded.model, mesh=mesh)
    assert all(is_sharded(parameter) for parameter in loaded.model.parameters())


def _run_case(name: str, folder: Path, rank: int, world: int) -> None:
    loaded = model_of(CASES[name])
    if world > 1:
        _shard(loaded, world)
    acted = train_guarded(loaded, loaded.model, CASES[name], rank, world, folder)
    state = {key: whole(parameter.detach()).clone() for key, parameter in loaded.model.named_parameters()}
    save(str(folder), rank, world, state, acted)


def _refusal(case: Case) -> str:
    """What a guard says before its first step."""
    loaded = model_of(case)
    _shard(loaded, 2)
    optimizer = torch.optim.SGD([p for p in loaded.model.parameters() if p.requires_grad], lr=0.1)
    try:
        SafetyGuard(loaded, ANCHORS, case.rule, **case.options).install(optimizer)
    except GuardError as error:
        return str(error)
    return "installed"


def _verdicts(folder: Path, rank: int) -> list[str]:
    """What the check of a saved model says of the model's own weights, and of others."""
    loaded, said = tiny_model(), []
    for seed, place in enumerate(("own", "other")):
        if rank == 0:
            other = tiny_model(seed=seed)
            other.model.save_pretrained(folder / place)
            other.tokenizer.save_pretrained(folder / place)
    _shard(loaded, 2)
    for place in ("own", "other"):
        try:
            verify_saved(folder / place, loaded.model, loaded, rank == 0)
            said.append("same")
        except TrimtabError as error:
            said.append(str(error))
    return said


def _numbers(task: dict[str, torch.Tensor], anchor: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What Algorithm 1 on shards reports, and the edited gradients."""
    like = tiny_model()
    _shard(like, 2)
    shards = dict(like.model.named_parameters())
    mine, theirs = ({name: cut_like(g, shards[name]) for name, g in both.items()} for both in (task, anchor))
    found = spf_on_shards(mine, theirs, 2)
    return {"surgery": found[1:], "edited": {name: whole(value) for name, value in mine.items()}}


def _gradients(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in tiny_model().model.named_parameters()}


def _conflicting() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    anchor = _gradients(1)
    return {name: value - anchor[name] for name, value in _gradients(0).items()}, anchor


def _run_all(rank: int, world: int, folder: str) -> None:
    with joined(rank, world):
        for name in CASES:
            _run_case(name, Path(folder) / name, rank, world)
        said = {name: _refusal(case) for name, case in REFUSED.items()}
        said["verified"] = _verdicts(Path(folder), rank)  # type: ignore[assignment]
        (Path(folder) / f"said-{rank}.json").write_text(json.dumps(said))
        torch.save(_numbers(*_conflicting()), Path(folder) / f"numbers-{rank}.pt")
        dist.barrier()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two sharded processes have filled."""
    folder = tmp_path_factory.mktemp("fsdp2")
    for name in CASES:
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_TEST_PORT", str(free_port()))
        mp.spawn(_run_all, args=(2, str(folder)), nprocs=2)
    return folder


def _said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_sharded_processes_equal_one(name: str, two_processes: Path) -> None:
    _run_case(name, two_processes / name, 0, 1)
    assert_equal_to_one(two_processes / name, CASES[name].tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_on_shards_is_refused_before_the_first_step(name: str, two_processes: Path) -> None:
    for said in _said(two_processes):
        assert "FSDP2" in said[name] and "DDP" in said[name]


def test_a_saved_model_is_compared_with_the_sharded_one(two_processes: Path) -> None:
    main, other = (said["verified"] for said in _said(two_processes))
    assert main[0] == "same" and "not the model that was trained" in main[1]
    assert other == ["same", "same"]  # they only help to gather


def test_algorithm1_on_shards_reports_the_numbers_of_the_whole(two_processes: Path) -> None:
    task, anchor = _conflicting()
    expected = spf_algorithm1(task, SafetyGradient(0.0, dense=anchor), 2)
    assert expected.conflict < 0 and 0 < expected.removed < 1
    for rank in (0, 1):
        found = torch.load(two_processes / f"numbers-{rank}.pt")
        assert found["surgery"] == pytest.approx(expected[1:], rel=1e-5)
        for name, value in expected.gradients.items():
            torch.testing.assert_close(found["edited"][name], value, atol=1e-4, rtol=1e-4)
