"""DeepSpeed ZeRO 0 to 3 on two gloo processes against one plain process: same decisions, same parameters.

In float32, which is what the engine keeps, and with SGD, which does not enlarge rounding as AdamW's first steps do.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.distributed.loop import STEPS, Case, assert_equal_to_one, free_port, joined, save
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.zero import ZeroHandle

pytest.importorskip("deepspeed")

CASES = {
    "keel": Case("keel", {"margin": 0.005, "settle_rounds": 4}, tolerance=5e-4),
    # At a margin of 1e-5 the excess is of the size of float32's rounding of the loss, which would set the step.
    "keel-lora": Case("keel", {"margin": 1e-4, "settle_rounds": 4}, lora=True, tolerance=1e-4),
}


def _model(case: Case) -> LoadedModel:
    loaded = tiny_model()
    if not case.lora:
        return loaded
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
    return LoadedModel(model, loaded.tokenizer, loaded.name)


def _engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, stage: int, **more: Any) -> Any:
    import deepspeed

    configuration = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **more,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)[0]


def _whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own copies, which is what is saved; of stage 3 put together from the ranks' parts."""
    found = {}
    for name, parameter in model.named_parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            found[name] = parameter.detach().clone()
            continue
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach().clone())
        found[name] = torch.cat([piece.flatten() for piece in parts])[: parameter.ds_numel].view(parameter.ds_shape)
    return found


def _run(rank: int, world: int, name: str, stage: int, folder: str) -> None:
    case = CASES[name]
    with joined(rank, world):
        loaded = _model(case)
        model: Any = loaded.model
        if world > 1:  # in a process of its own
            os.environ["LOCAL_RANK"] = str(rank)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        engine = _engine(model, optimizer, stage) if world > 1 else None
        guard = SafetyGuard(loaded, ANCHORS, case.rule, model=engine or model, **case.options)
        handle = guard.install(engine.optimizer if engine else optimizer)
        rows = torch.randint(4, 30, (STEPS, 4, 10), generator=torch.Generator().manual_seed(3))
        for batch in rows:
            part = batch.chunk(world)[rank]
            logits = (engine or model)(input_ids=part).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
            if engine:
                engine.backward(loss)
                engine.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        handle.remove()
        guard.finish()
        state = _whole(model) if engine else dict(model.named_parameters())
        acted = [report.acted for report in guard.history]
        save(folder, rank, world, {key: tensor.detach().clone() for key, tensor in state.items()}, acted)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles a part of itself")
@pytest.mark.usefixtures("deepspeed_on_cpu")
@pytest.mark.parametrize(("name", "stage"), [("keel", 0), ("keel", 1), ("keel", 2), ("keel", 3), ("keel-lora", 3)])
def test_two_processes_equal_one(name: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(free_port()))
    _run(0, 1, name, stage, str(tmp_path))
    mp.spawn(_run, args=(2, name, stage, str(tmp_path)), nprocs=2)
    assert_equal_to_one(tmp_path, CASES[name].tolerance)


def _drift_in_bfloat16(rank: int, world: int, margin: float, folder: str) -> None:
    """Ten steps with bfloat16 weights under stage 3; the drift of the model that would be saved."""
    with joined(rank, world):
        os.environ["LOCAL_RANK"] = str(rank)
        loaded = tiny_model()
        optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.5)
        engine = _engine(loaded.model, optimizer, 3, bf16={"enabled": True})
        options = {"margin": margin, "settle_rounds": 4, "autocast": torch.bfloat16}
        guard = SafetyGuard(loaded, ANCHORS, "keel", model=engine, **options)
        handle = guard.install(engine.optimizer)
        for batch in torch.randint(4, 30, (STEPS, 4, 10), generator=torch.Generator().manual_seed(3)):
            part = batch.chunk(world)[rank]
            logits = engine(input_ids=part).logits.float()
            engine.backward(F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()))
            engine.step()
        handle.remove()
        guard.finish()
        assert next(loaded.model.parameters()).dtype == torch.bfloat16
        torch.save(guard.history[-1].excess, Path(folder) / f"{margin}-{rank}.pt")


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles a part of itself")
@pytest.mark.usefixtures("deepspeed_on_cpu")
def test_corrections_of_bfloat16_weights_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_PORT", str(free_port()))
    guarded, watched = 0.005, 1e9
    for margin in (guarded, watched):
        mp.spawn(_drift_in_bfloat16, args=(2, margin, str(tmp_path)), nprocs=2)
    held, lost = (torch.load(tmp_path / f"{margin}-0.pt") for margin in (guarded, watched))
    assert torch.load(tmp_path / f"{guarded}-1.pt") == held  # every rank decides on the same numbers
    for side in ("refuse", "answer"):
        assert held[side] < 0.02 < 0.1 < lost[side]


@pytest.mark.parametrize("rule", ["spf", "mixing", "lisa"])
def test_rules_that_write_gradients_themselves_are_refused(rule: str) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, rule)
    with pytest.raises(GuardError, match="does not work under DeepSpeed"):
        guard.install(object.__new__(DeepSpeedZeroOptimizer))


def test_an_engine_without_float32_parameters_is_refused_before_the_first_step() -> None:
    """As in bfloat16 under stage 0."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    with pytest.raises(GuardError, match="no float32 copy"):
        SafetyGuard(tiny_model(), ANCHORS, "keel").install(object.__new__(DeepSpeedZeroOptimizer))


def test_the_hook_is_taken_off_and_leaves_another_ones_alone() -> None:
    class Plain:
        def step(self) -> str:
            return "own"

    calls: list[str] = []
    optimizer: Any = Plain()
    handle = ZeroHandle(optimizer, lambda: calls.append("guard"))
    assert optimizer.step() == "own" and calls == ["guard"]
    handle.remove()
    assert "step" not in vars(optimizer)
    optimizer.step = lambda: "wrapped"
    handle = ZeroHandle(optimizer, lambda: calls.append("guard"))
    assert optimizer.step() == "wrapped"
    handle.remove()
    assert optimizer.step() == "wrapped" and calls == ["guard", "guard"]


def test_float16_is_refused() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    loaded = tiny_model()
    loaded.model.half()
    with pytest.raises(GuardError, match="float16"):
        SafetyGuard(loaded, ANCHORS, "keel").install(object.__new__(DeepSpeedZeroOptimizer))
