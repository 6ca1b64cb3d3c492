"""Gradient scalers and float16: fused optimizers, steps that overflow, anchors whose gradient is tiny."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids
from transformers import TrainerControl, TrainerState

from trimtab.errors import GuardError
from trimtab.tuning.callback import SafetyGuardCallback
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.half import SCALES, dense_gradients, factored_gradient, half_precision
from trimtab.tuning.pools import build_pools, reader_for

FUSED_RULES: list[tuple[str, dict[str, Any]]] = [
    ("keel", {"margin": -1.0}), ("spf", {}), ("mixing", {}), ("per-tensor", {}), ("a-gem", {}), ("pcgrad", {}),
    ("safegrad", {}), ("alternating", {}), ("spard", {"alpha_max": 0.01}), ("lisa", {"align_steps": 2}),
]  # fmt: skip


def _run(rule: str, options: dict[str, Any], scale: float | None, half: bool = False, fused: bool = True) -> Any:
    """Three steps, with a scaler where ``scale`` is given and nobody unscales."""
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, rule, autocast=torch.float16 if half else None, **options)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with guard.attach(optimizer):
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                loss = _loss(loaded.model, _task_ids())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return guard, [p.detach() for p in loaded.model.parameters()]


@pytest.mark.parametrize(("rule", "options"), FUSED_RULES, ids=[rule for rule, _ in FUSED_RULES])
def test_a_fused_optimizer_with_a_scaler_steps_as_without(rule: str, options: dict[str, Any]) -> None:
    plain, scaled = _run(rule, options, None), _run(rule, options, 2.0**16)
    assert scaled[0].counters == plain[0].counters and scaled[0].counters.acted > 0
    for mine, theirs in zip(scaled[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("rule", ["keel", "spard"])
def test_a_step_that_a_fused_optimizer_skips_is_skipped_by_the_guard(rule: str, unscaled_before: bool) -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, rule, **({"margin": -1.0} if rule == "keel" else {}))
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = guard.install(optimizer)
    before = [p.detach().clone() for p in loaded.model.parameters()]
    scaler.scale(_loss(loaded.model, _task_ids())).backward()
    next(loaded.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    if unscaled_before:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    handle.remove()
    assert (guard.counters.steps, guard.counters.skipped, guard.history) == (0, 1, [])
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rule", "options"), FUSED_RULES, ids=[rule for rule, _ in FUSED_RULES])
def test_float16_autocast_with_a_scaler_follows_float32(rule: str, options: dict[str, Any], fused: bool) -> None:
    """Three Adam steps of 1e-2 each: float16's rounding may turn a step of a near-zero gradient, but not many."""
    plain, half = _run(rule, options, None, fused=fused), _run(rule, options, 2.0**10, half=True, fused=fused)
    assert half[0].counters.steps == 3 and half[0].counters.skipped == 0
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(half[1], plain[1], strict=True)])
    assert float(apart.max()) < 0.1 and float(apart.mean()) < 4e-3


def _memorised() -> Any:
    """A model that says its anchors nearly surely, so that the gradient of their loss is tiny."""
    loaded = tiny_model()
    rows = build_pools(loaded, ANCHORS, 3)["refuse"].rows
    reader = reader_for(loaded, loaded.model)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        reader.losses(rows).mean().backward()
        optimizer.step()
    return loaded.model, reader, rows


def test_the_gradient_of_anchors_that_are_nearly_sure_does_not_vanish_in_float16() -> None:
    model, reader, rows = _memorised()
    parameters = dict(model.named_parameters())
    exact = dense_gradients(1e-4 * reader.losses(rows).mean(), parameters)

    def half(active: bool) -> float:
        """Relative error of the whole gradient."""
        with torch.autocast("cpu", dtype=torch.float16):
            loss = 1e-4 * reader.losses(rows).mean()
        with half_precision(active):
            found = dense_gradients(loss, parameters)
        wrong = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
        return (wrong / sum(float(block.square().sum()) for block in exact.values())) ** 0.5

    def factored(active: bool) -> float:
        """The same for the factors, by their norm."""
        with half_precision(active), torch.autocast("cpu", dtype=torch.float16):
            found = factored_gradient(model, lambda: 1e-4 * reader.losses(rows).mean())
        size = sum(float(block.square().sum()) for block in exact.values()) ** 0.5
        return abs(found.squared_norm() ** 0.5 / size - 1)

    assert half(False) > 0.5 and factored(False) > 0.5
    assert half(True) < 0.1 and factored(True) < 0.1


def test_a_scale_that_overflows_is_lowered_and_the_loss_reported_is_the_unscaled_one() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float16))
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = weight
    loss = (layer(torch.full((1, 1), 100.0, dtype=torch.float16))).float().sum()  # at 2^12 its gradient is 409,600
    with half_precision(True):
        assert float(dense_gradients(loss, {"w": weight})["w"]) == pytest.approx(100.0)
        found = factored_gradient(layer, lambda: layer(torch.full((1, 1), 100.0, dtype=torch.float16)).float().sum())
    assert found.loss == pytest.approx(100.0) and float(found.factored["weight"].dense()) == pytest.approx(100.0)
    bad = weight.float().sum() * float("nan")
    with half_precision(True), pytest.raises(GuardError, match="any loss scale"):
        dense_gradients(bad, {"w": weight})
    assert SCALES[-1] == 1.0


def test_what_cannot_be_unscaled_is_refused() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "mixing")
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2, fused=True)
    guard.install(optimizer)
    with pytest.raises(GuardError, match="unscales gradients by itself"):
        guard._on_step(optimizer, (optimizer,), {"grad_scaler": object()})
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    parameter = next(loaded.model.parameters())
    parameter.data = parameter.data.half()
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(GuardError, match="without loss"):
        guard._on_step(optimizer, (optimizer,), {})


class Trained:
    """The callback's events around an accelerated optimizer, as a trainer sends them."""

    def __init__(self, fused: bool, tmp_path: Any) -> None:
        Accelerator(cpu=True)
        self.loaded = tiny_model()
        inner = torch.optim.AdamW(self.loaded.model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        self.args: Any = SimpleNamespace(
            deepspeed=None, fp16=True, bf16=False, output_dir=str(tmp_path), resume_from_checkpoint=None
        )
        self.state, self.control = TrainerState(max_steps=4), TrainerControl()
        self.state.is_world_process_zero = True
        self.callback = SafetyGuardCallback(ANCHORS, "mixing")
        self.given = {"model": self.loaded.model, "processing_class": self.loaded.tokenizer}
        self.send("on_train_begin")

    def send(self, event: str) -> None:
        getattr(self.callback, event)(self.args, self.state, self.control, optimizer=self.optimizer, **self.given)

    def step(self, overflow: bool = False) -> None:
        self.optimizer.scaler.scale(_loss(self.loaded.model, _task_ids())).backward()
        if overflow:
            next(self.loaded.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        self.optimizer.step()
        self.send("on_optimizer_step")
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.send("on_step_end")


@pytest.mark.parametrize("fused", [False, True])
def test_the_callback_knows_how_many_steps_the_scaler_skipped(fused: bool, tmp_path: Any) -> None:
    run = Trained(fused, tmp_path)
    for overflow in (True, False, True, False):
        run.step(overflow)
    run.send("on_train_end")
    counters = run.callback.guard.counters  # type: ignore[union-attr]
    assert (counters.steps, counters.skipped) == (2, 2)
    rows = (tmp_path / "guard.jsonl").read_text().splitlines()
    assert [("skipped" in row) for row in rows] == [False, True, False, True, False]  # the first is the start


@pytest.mark.parametrize("fused", [False, True])
def test_a_missed_step_that_the_scaler_did_not_skip_raises_in_float16_too(fused: bool, tmp_path: Any) -> None:
    run = Trained(fused, tmp_path)
    run.step(overflow=True)
    run.step()
    run.state.global_step += 1  # a step that passed the guard by
    with pytest.raises(GuardError, match="did not see every"):
        run.send("on_train_end")
