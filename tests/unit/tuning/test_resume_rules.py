"""Every rule resumed from its saved state equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss
from torch import nn

from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning import state
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.state import load_state, require_same_requests, save_state

CASES = [
    ("spf", {"rank": 2, "rows": 1}),
    ("spf", {"rank": 2, "rows": 1, "refresh_every": 3}),  # the cut at step 4 lies between two refreshes
    ("mixing", {"rows": 1}),
    ("keel", {"rows": 1, "answer_rows": 1}),
    ("keel-patient", {"rows": 1, "answer_rows": 1, "calm_looks": 2, "margin": 0.4}),
    ("per-tensor", {"threshold": 1e-2}),
    ("a-gem", {"rows": 1}),
    ("pcgrad", {"rows": 1}),
    ("safegrad", {"rows": 1}),
    ("alternating", {}),
    ("spard", {"rows": 1, "alpha_max": 0.01}),
    ("lisa", {"rows": 1, "align_steps": 2, "task_steps": 3}),  # both states have ended once before the cut
    ("lisa", {"rows": 1, "align_steps": 3, "task_steps": 2}),
]


class Run:
    """A guarded run that can be cut and continued with everything a trainer's checkpoint holds."""

    def __init__(self, rule: str, options: dict[str, object], lora: bool) -> None:
        loaded = tiny_model()
        model: nn.Module = loaded.model
        if lora:
            torch.manual_seed(1)
            model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
        self.model = model
        self.guard = SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), ANCHORS, rule, **options)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(self, first: int, last: int) -> None:
        handle = self.guard.install(self.optimizer)
        for index in range(first, last):
            ids = torch.randint(4, 30, (4, 10), generator=torch.Generator().manual_seed(index))
            _loss(self.model, ids).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        handle.remove()

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("rule", "options"), CASES, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(CASES)])
def test_resumed_equals_uninterrupted(rule: str, options: dict[str, object], lora: bool, tmp_path: Path) -> None:
    whole, first, second = (Run(rule, options, lora) for _ in range(3))
    whole.train(0, 8)
    first.train(0, 4)
    save_state(tmp_path, first.guard.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.guard.load_state_dict(load_state(tmp_path))
    second.train(4, 8)
    assert second.guard.counters == whole.guard.counters
    assert second.guard.history == whole.guard.history[4:]
    for name, value in whole.trained().items():
        assert torch.equal(second.trained()[name], value), name
    assert vars(second.guard.rule).get("disabled") == vars(whole.guard.rule).get("disabled")


def test_the_disabled_count_of_per_tensor_is_of_the_whole_run(tmp_path: Path) -> None:
    run = Run("per-tensor", {"threshold": 1e9}, lora=False)
    run.train(0, 4)
    counted = run.guard.rule.disabled  # type: ignore[attr-defined]
    assert counted > 0
    save_state(tmp_path, run.guard.state_dict())
    again = Run("per-tensor", {"threshold": 1e9}, lora=False)
    again.guard.load_state_dict(load_state(tmp_path))
    assert again.guard.rule.disabled == counted  # type: ignore[attr-defined]


def test_spf_saves_its_cached_gradient_only_where_it_is_used_again() -> None:
    every, third = (Run("spf", {"rank": 2, "refresh_every": n}, lora=False) for n in (1, 3))
    every.train(0, 2)
    third.train(0, 2)
    assert every.guard.state_dict()["tensors"] == {} and third.guard.state_dict()["tensors"]


def test_spf_resumed_between_refreshes_without_its_cached_gradient_is_refused() -> None:
    run = Run("spf", {"rank": 2, "refresh_every": 3}, lora=False)
    run.train(0, 2)
    again = Run("spf", {"rank": 2, "refresh_every": 3}, lora=False)
    again.guard.load_state_dict({**run.guard.state_dict(), "tensors": {}})
    with pytest.raises(GuardError, match="no cached"):
        again.train(2, 3)


def test_a_run_goes_on_with_its_own_anchors_only() -> None:
    """The aligned model may have answered fewer than were named; none may be new."""
    require_same_requests(ANCHORS, replace(ANCHORS, anchors=ANCHORS.anchors[:1]))
    other = replace(ANCHORS, anchors=(replace(ANCHORS.anchors[0], request="another thing"),))
    with pytest.raises(GuardError, match=r"(?s)other anchors.*1 of 1 requests.*another thing"):
        require_same_requests(ANCHORS, other)


def test_anchors_that_were_changed_in_a_checkpoint_are_told(tmp_path: Path) -> None:
    run = Run("keel", {"rows": 1, "answer_rows": 1}, lora=False)
    run.train(0, 1)
    save_state(tmp_path, run.guard.state_dict())
    assert load_state(tmp_path)["anchors"] == run.guard.anchors
    record = tmp_path / state.RECORD
    content = json.loads(record.read_text())
    content["anchors"]["anchors"][0]["reply"] = "gladly"
    record.write_text(json.dumps(content))
    with pytest.raises(GuardError, match="anchors in the checkpoint are damaged"):
        load_state(tmp_path)
