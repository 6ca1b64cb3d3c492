"""What the distributed tests share: joining a gloo group, and the guarded training loop over one rank's part."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.state import load_state, save_state

STEPS = 10
STUCK = timedelta(seconds=300)  # a rank that waits longer for the other one has been left alone


@dataclass(frozen=True)
class Case:
    """A rule with its options, on all parameters or on LoRA's; ``resume_at``: a new guard continues from that step.

    ``tolerance``: of a parameter at the end, absolute; larger where the rule itself works in float32.
    """

    rule: str
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    resume_at: int | None = None
    tolerance: float = 1e-5


#: By name; "keel-glances" begins every step with a glance, as after a calm stretch.
CASES: dict[str, Case] = {
    "keel": Case("keel"),
    "keel-glances": Case("keel", {"calm_after": 0, "calm_rows": 1}),
    "keel-resumed": Case("keel", resume_at=5),
    # Adapters move this model little in ten steps. Its distributions are nearly flat: rounding would grow from one
    # correction to the next where these are held.
    "keel-lora": Case("keel", {"margin": 0.001, "target": "words"}, lora=True, tolerance=1e-4),
    "mixing": Case("mixing"),
    "mixing-lora": Case("mixing", lora=True),
    "spf": Case("spf", {"rank": 2}, tolerance=2e-4),
    "spf-lora": Case("spf", {"rank": 2}, lora=True, tolerance=2e-4),
    "a-gem": Case("a-gem"),
    "pcgrad": Case("pcgrad"),
    "safegrad": Case("safegrad"),
    "alternating": Case("alternating"),
    "spard": Case("spard"),
    "lisa": Case("lisa", {"align_steps": 2, "task_steps": 2, "free_share": 0.0}),
    "lisa-resumed": Case("lisa", {"align_steps": 2, "task_steps": 2, "free_share": 0.0}, resume_at=5),
}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def joined(rank: int, world: int) -> Iterator[None]:
    """A member of the gloo group at TRIMTAB_TEST_PORT; alone, nothing is joined."""
    torch.set_num_threads(1)
    if world == 1:
        yield
        return
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["TRIMTAB_TEST_PORT"], RANK=str(rank), WORLD_SIZE=str(world)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=STUCK)
    yield
    dist.destroy_process_group()


def model_of(case: Case) -> LoadedModel:
    """The tiny model, with adapters where the case trains them; the same on every rank.

    In double precision: what is compared is which sums are taken, and float32's rounding would decide near a margin.
    """
    loaded = tiny_model()
    loaded.model.double()
    if not case.lora:
        return loaded
    model: Any = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
    return LoadedModel(model, loaded.tokenizer, loaded.name)


def train_guarded(
    loaded: LoadedModel, model: torch.nn.Module, case: Case, rank: int, world: int, folder: Path
) -> list[Any]:
    """Ten AdamW steps on this rank's rows of each batch; what the guard acted on in each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2 if case.lora else 1e-2)
    guard = SafetyGuard(loaded, ANCHORS, case.rule, model=model, **case.options)
    handle, history = guard.install(optimizer), guard.history
    rows = torch.randint(4, 30, (STEPS, 4, 10), generator=torch.Generator().manual_seed(3))
    for index, batch in enumerate(rows):
        if index == case.resume_at:
            handle.remove()
            guard = _resumed(guard, loaded, model, case, rank, world, folder)
            handle, guard.history = guard.install(optimizer), history
        part = batch.chunk(world)[rank]
        logits = model(input_ids=part).logits  # Transformers' own loss is in float32
        F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    guard.finish()
    return [report.acted for report in history]


def _resumed(
    guard: SafetyGuard, loaded: LoadedModel, model: torch.nn.Module, case: Case, rank: int, world: int, folder: Path
) -> SafetyGuard:
    """Another guard with the state that the first rank wrote, as a checkpoint's callback does."""
    state = guard.state_dict()
    if rank == 0:
        save_state(folder, state)
    if world > 1:
        dist.barrier()
    again = SafetyGuard(loaded, ANCHORS, case.rule, model=model, **case.options)
    again.load_state_dict(load_state(folder))
    return again


def save(folder: str, rank: int, world: int, state: dict[str, torch.Tensor], acted: list[Any]) -> None:
    torch.save({"state": state, "acted": acted}, Path(folder) / f"{world}-{rank}.pt")


def assert_equal_to_one(folder: Path, tolerance: float) -> None:
    """Both ranks decided and ended as the single process did; their parameters are bit-identical to each other."""
    one, first, second = (torch.load(folder / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one["acted"]) >= STEPS and first["acted"] == second["acted"] == one["acted"]
    assert any(one["acted"])
    for name, tensor in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), f"the ranks differ in {name}"
        torch.testing.assert_close(first["state"][name], tensor, atol=tolerance, rtol=10 * tolerance)
