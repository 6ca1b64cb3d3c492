"""What the distributed tests share: joining a gloo group, and the guarded training loop over one rank's part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.unit.tuning.test_guard import ANCHORS
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard

STEPS = 10
#: Rule and options by name; "keel-glances" begins every step with a glance, as after a calm stretch.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "keel": ("keel", {}),
    "keel-glances": ("keel", {"calm_after": 0, "calm_rows": 1}),
    "mixing": ("mixing", {}),
    "spf": ("spf", {"rank": 2}),
    "a-gem": ("a-gem", {}),
}


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
    dist.init_process_group("gloo", rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


def train_guarded(loaded: LoadedModel, model: torch.nn.Module, rule: str, rank: int, world: int) -> list[Any]:
    """Ten AdamW steps on this rank's rows of each batch; what the guard acted on in each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    name, options = RULES[rule]
    guard = SafetyGuard(loaded, ANCHORS, name, model=model, **options)
    rows = torch.randint(4, 30, (STEPS, 4, 10), generator=torch.Generator().manual_seed(3))
    with guard.attach(optimizer):
        for batch in rows:
            part = batch.chunk(world)[rank]
            model(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [report.acted for report in guard.history]


def save(folder: str, rank: int, world: int, state: dict[str, torch.Tensor], acted: list[Any]) -> None:
    torch.save({"state": state, "acted": acted}, Path(folder) / f"{world}-{rank}.pt")


def assert_equal_to_one(folder: Path) -> None:
    """Both ranks decided and ended as the single process did; their parameters are bit-identical to each other."""
    one, first, second = (torch.load(folder / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one["acted"]) >= STEPS and first["acted"] == second["acted"] == one["acted"]
    assert any(one["acted"])
    for name, tensor in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), f"the ranks differ in {name}"
        torch.testing.assert_close(first["state"][name], tensor, atol=1e-4, rtol=1e-3)
