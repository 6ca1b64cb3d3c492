"""The callback under TRL's other trainers, adapters of other kinds, and the gradient scaler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids

from trimtab.errors import GuardError
from trimtab.gradients.factors import safety_gradient
from trimtab.models import LoadedModel
from trimtab.tuning.callback import SafetyGuardCallback
from trimtab.tuning.guard import SafetyGuard, innermost, innermost_optimizer

COMMON: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none",
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


@pytest.mark.parametrize("rule", ["keel", "spf"])
def test_dpo_trainer(rule: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    loaded = tiny_model()
    rows = [{"prompt": f"route this {w}", "chosen": "billing", "rejected": "weather"} for w in ("cake", "base", "day")]
    callback = SafetyGuardCallback(ANCHORS, rule)
    trainer = DPOTrainer(
        model=loaded.model, ref_model=tiny_model().model, args=DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(rows * 4), processing_class=loaded.tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.guard is not None and callback.guard.counters.steps == 3
    assert any("guard/acted" in row for row in trainer.state.log_history)


def test_grpo_trainer(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    loaded = tiny_model()
    settings = {**COMMON, "max_steps": 2, "num_generations": 2, "max_completion_length": 4}
    callback = SafetyGuardCallback(ANCHORS, "keel", margin=-1.0)
    trainer = GRPOTrainer(
        model=loaded.model, args=GRPOConfig(output_dir=str(tmp_path), **settings),
        reward_funcs=lambda completions, **_: [float(len(set(str(text)))) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": f"route this {w}"} for w in ("cake", "base", "day", "weather")]),
        processing_class=loaded.tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.guard is not None and callback.guard.counters.steps == 2 == callback.guard.counters.acted


@pytest.mark.parametrize("rule", ["keel", "spf", "a-gem"])
def test_dora_trains_guarded_and_its_factors_equal_autograd(rule: str) -> None:
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    guard = SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), ANCHORS, rule)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    with guard.attach(optimizer):
        for _ in range(4):
            _loss(model, _task_ids()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.counters.steps == 4
    safety = safety_gradient(model, lambda: _loss(model, _task_ids()))
    _loss(model, _task_ids()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            squared = float(parameter.grad.double().square().sum())
            assert float(safety.inner(name, parameter.grad)) == pytest.approx(squared, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("rule", ["keel", "spf", "per-tensor", "a-gem", "safegrad", "mixing"])
def test_a_scaled_loss_changes_nothing(rule: str) -> None:
    """The scaler unscales before the hook, so a scale of 2^16 leaves every rule's step as it was."""
    finals = []
    for scale in (None, 2.0**16):
        loaded = tiny_model()
        guard = SafetyGuard(loaded, ANCHORS, rule)
        optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with guard.attach(optimizer):
            for _ in range(5):
                scaler.scale(_loss(loaded.model, _task_ids())).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        finals.append((guard.counters, [p.detach() for p in loaded.model.parameters()]))
    assert finals[0][0] == finals[1][0]
    for plain, scaled in zip(finals[0][1], finals[1][1], strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-5, rtol=1e-3)


def test_a_step_that_overflowed_is_skipped_with_its_guard() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "keel", margin=-1.0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = guard.install(optimizer)
    before = [p.detach().clone() for p in loaded.model.parameters()]
    scaler.scale(_loss(loaded.model, _task_ids())).backward()
    next(loaded.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert guard.counters.steps == 0 and scaler.get_scale() == 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))
    handle.remove()


def test_checkpointing_inside_a_trainer(tmp_path: Path) -> None:
    """Recomputation in the task's backward, none for the anchors: the same run as without."""
    from trl import SFTConfig, SFTTrainer

    finals = []
    for checkpointing in (False, True):
        loaded = tiny_model()
        settings = {**COMMON, "gradient_checkpointing": checkpointing, "max_length": 32}
        rows = [{"prompt": f"route this {w}", "completion": "billing"} for w in ("cake", "base", "weather", "day")]
        callback = SafetyGuardCallback(ANCHORS, "keel", margin=-1.0)
        SFTTrainer(
            model=loaded.model, args=SFTConfig(output_dir=str(tmp_path / str(checkpointing)), **settings),
            train_dataset=Dataset.from_list(rows * 2), processing_class=loaded.tokenizer, callbacks=[callback],
        ).train()  # fmt: skip
        assert callback.guard is not None and callback.guard.counters.acted == 3
        finals.append([p.detach() for p in loaded.model.parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("system", [None, "You route messages."])
def test_anchors_are_written_where_their_file_can_hold_them(system: str | None, tmp_path: Path) -> None:
    """A file has no place for a system message, and the replies belong to it: read again they would be others."""
    from trl import SFTConfig, SFTTrainer

    loaded = tiny_model()
    callback = SafetyGuardCallback(replace(ANCHORS, system=system), "keel")
    rows = [{"prompt": "route this cake", "completion": "billing"}] * 8
    SFTTrainer(
        model=loaded.model, args=SFTConfig(output_dir=str(tmp_path), **{**COMMON, "max_length": 64}),
        train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer, callbacks=[callback],
    ).train()  # fmt: skip
    assert (tmp_path / "guard.jsonl").is_file()
    assert (tmp_path / "guard_anchors.jsonl").is_file() == (system is None)


def test_fsdp1_and_unknown_optimizers_are_refused_saying_what_to_do() -> None:
    fsdp1 = type("FullyShardedDataParallel", (torch.nn.Module,), {})
    with pytest.raises(GuardError, match="fsdp_version 2"):
        innermost(fsdp1())
    with pytest.raises(GuardError, match="cannot hook"):
        innermost_optimizer(type("DeepSpeedZeroOptimizer", (), {"optimizer": None})())


def test_the_axolotl_plugin_gives_the_callback_and_refuses_what_is_no_step_rule() -> None:
    from trimtab.errors import UsageError
    from trimtab.tuning.axolotl import TrimtabArguments, TrimtabPlugin

    plugin = TrimtabPlugin()
    made = plugin.add_callbacks_post_trainer({"trimtab_guard": "spf", "trimtab_options": {"rank": 3}}, None)
    assert isinstance(made[0], SafetyGuardCallback) and made[0].rule == "spf" and made[0].options == {"rank": 3}
    assert plugin.add_callbacks_post_trainer({"trimtab_guard": "none"}, None) == []
    assert plugin.add_callbacks_post_trainer({}, None)[0].rule == "keel"
    with pytest.raises(UsageError, match="axolotl"):
        plugin.add_callbacks_post_trainer({"trimtab_guard": "resta"}, None)
    assert plugin.get_input_args().endswith(TrimtabArguments.__name__)
