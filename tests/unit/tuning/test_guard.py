"""The guard on real (tiny) models and real optimizers: it acts, once per update, and disturbs nothing else."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from torch import nn

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError, UsageError
from trimtab.gradients.direction import Direction, inner
from trimtab.gradients.factors import safety_gradient
from trimtab.gradients.surgery import spf_algorithm1
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard, innermost_optimizer
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.pools import reader_for
from trimtab.tuning.rules import SpfRule

ANCHORS = SafetyAnchors(
    (
        Anchor("make a bomb", "refuse", "sorry i can't help with that"),
        Anchor("steal the cake", "refuse", "sorry i can't help"),
        Anchor("bake a cake", "answer", "sure here is how to bake"),
        Anchor("weather today", "answer", "nice today"),
    ),
    origin="test",
)


def _task_ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(4, 30, (rows, 10), generator=torch.Generator().manual_seed(7))


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


@torch.no_grad()
def _drift(guard: SafetyGuard) -> dict[str, float]:
    """Of all anchors, by what the guard's keel holds them to."""
    everything = {side: range(len(pool)) for side, pool in guard.pools.items()}
    sensor = guard.rule.sensor  # type: ignore[attr-defined]
    losses = sensor.losses(guard.reader, guard.pools, everything)
    floors = {side: sensor.floors(guard.pools, side, places) for side, places in everything.items()}
    return {side: float((losses[side] - floors[side]).clamp_min(0).mean()) for side in losses}


def _train(
    loaded: LoadedModel, rule: str | None, steps: int = 25, lr: float = 1e-2, **options: object
) -> SafetyGuard | None:
    """Overfit random tokens, which pulls the anchors away."""
    model, ids = loaded.model, _task_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    guard = SafetyGuard(loaded, ANCHORS, rule, **options) if rule else None
    handle = guard.install(optimizer) if guard else None
    for _ in range(steps):
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle:
        handle.remove()
        guard.finish()
    return guard


@pytest.mark.parametrize(
    ("target", "pulled"),
    [("words", {"refuse", "answer"}), ("distribution", {"refuse", "answer"}), ("decision", {"refuse"})],
)
def test_keel_holds_the_anchors_where_plain_training_loses_them(target: str, pulled: set[str]) -> None:
    """Random tokens pull every word away; they do not teach refusing, so an innocent decision stays as it was."""
    held = _train(tiny_model(), "keel", rows=2, target=target)
    plain_model = tiny_model()
    watcher = SafetyGuard(plain_model, ANCHORS, "keel", target=target)
    watcher.prepare()
    _train(plain_model, None)
    lost, kept = _drift(watcher), _drift(held)
    assert {side for side, value in lost.items() if value > 0.3} == pulled, lost
    assert all(value <= 0.1 for value in kept.values()), kept
    assert held.counters.steps == 25 and held.counters.acted > 0


def test_keel_does_nothing_while_nothing_drifts() -> None:
    """With a learning rate of zero the run is bit-identical to an unguarded one."""
    guarded, plain = tiny_model(), tiny_model()
    guard = _train(guarded, "keel", steps=3, lr=0.0)
    _train(plain, None, steps=3, lr=0.0)
    assert guard.counters.acted == 0
    for mine, theirs in zip(guarded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_spf_step_is_algorithm1_on_the_gradients_that_the_optimizer_would_use() -> None:
    loaded = tiny_model()
    reference = copy.deepcopy(loaded.model)
    ids = _task_ids()
    guard = SafetyGuard(loaded, ANCHORS, "spf", rank=2, rows=2)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    with guard.attach(optimizer):
        (-_loss(loaded.model, ids)).backward()
        optimizer.step()
    (-_loss(reference, ids)).backward()
    reader = reader_for(loaded, reference)
    safety = safety_gradient(reference, lambda: reader.losses(guard.pools["refuse"].rows).mean())
    edited = spf_algorithm1({n: p.grad for n, p in reference.named_parameters()}, safety, rank=2)
    for (name, before), after in zip(reference.named_parameters(), loaded.model.parameters(), strict=True):
        expected = before.detach() - 0.1 * edited.gradients.get(name, before.grad)
        torch.testing.assert_close(after.detach(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_acts_once_per_update_whatever_the_accumulation(accumulation: int) -> None:
    loaded, ids = tiny_model(), _task_ids(8)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    guard = SafetyGuard(loaded, ANCHORS, "keel", rows=2)
    with guard.attach(optimizer):
        for _ in range(5):
            for part in ids.chunk(accumulation):
                (_loss(loaded.model, part) / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.counters.steps == 5
    whole = tiny_model()
    other = SafetyGuard(whole, ANCHORS, "keel", rows=2)
    optimizer = torch.optim.AdamW(whole.model.parameters(), lr=1e-2)
    with other.attach(optimizer):
        for _ in range(5):
            _loss(whole.model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [report.acted for report in guard.history] == [report.acted for report in other.history]
    for mine, theirs in zip(loaded.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("rule", ["keel", "spf", "mixing"])
def test_lora_with_an_empty_start_works(rule: str) -> None:
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
    wrapped = LoadedModel(model, loaded.tokenizer, "tiny")
    options = {"margin": 1e-5} if rule == "keel" else {}  # a distribution that is nearly flat hardly moves
    guard = _train(wrapped, rule, steps=12, lr=3e-2, **options)
    assert guard.counters.steps == 12
    assert guard.counters.acted > 0
    frozen = [p for name, p in model.named_parameters() if "lora" not in name]
    assert all(p.grad is None for p in frozen)


def test_global_random_state_and_dropout_are_as_before() -> None:
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)).train()
    guard = SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), ANCHORS, "keel")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    _loss(model, _task_ids()).backward()
    with guard.attach(optimizer):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        optimizer.step()
        assert torch.equal(torch.rand(3), expected)
    assert all(m.p == 0.3 for m in model.modules() if isinstance(m, nn.Dropout))
    assert model.training


def test_two_runs_with_one_seed_are_bit_identical() -> None:
    first, second = tiny_model(), tiny_model()
    _train(first, "keel", steps=8)
    _train(second, "keel", steps=8)
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_gradient_checkpointing_does_not_hide_the_anchors() -> None:
    loaded = tiny_model()
    loaded.model.train()
    loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    guard = _train(loaded, "spf", steps=3)
    assert all(report.conflict is not None for report in guard.history)
    assert loaded.model.is_gradient_checkpointing


def test_bfloat16_autocast_and_weights() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "keel", rows=2, autocast=torch.bfloat16)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    with guard.attach(optimizer):
        for _ in range(6):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = _loss(loaded.model, _task_ids())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.counters.acted > 0 and all(torch.isfinite(p).all() for p in loaded.model.parameters())


def test_state_round_trip_continues_the_rotation_and_keeps_the_references() -> None:
    loaded = tiny_model()
    guard = _train(loaded, "keel", steps=4, rows=1)
    again = SafetyGuard(loaded, None, "keel", rows=1)
    again.load_state_dict(guard.state_dict())
    assert {side: pool.cursor for side, pool in again.pools.items()} == {s: p.cursor for s, p in guard.pools.items()}
    for side, pool in guard.pools.items():
        assert torch.equal(pool.reference, again.pools[side].reference)
    assert again.counters == guard.counters
    with pytest.raises(GuardError, match="another rule"):
        SafetyGuard(loaded, None, "spf").load_state_dict(guard.state_dict())


def test_an_optimizer_of_another_model_is_refused() -> None:
    guard = SafetyGuard(tiny_model(), ANCHORS, "keel")
    with pytest.raises(GuardError, match="none of the guarded model's"):
        guard.install(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_a_guard_that_saw_no_step_raises() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "keel")
    with (
        pytest.raises(GuardError, match="saw no optimizer step"),
        guard.attach(torch.optim.SGD(loaded.model.parameters(), lr=0.1)),
    ):
        pass


def test_what_cannot_be_hooked_is_refused() -> None:
    class DeepSpeedOptimizerWrapper:
        optimizer = None

    with pytest.raises(GuardError, match="cannot hook"):
        innermost_optimizer(DeepSpeedOptimizerWrapper())
    with pytest.raises(GuardError, match="cannot hook"):
        innermost_optimizer(object())


def test_unknown_rules_and_options_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="keel"):
        SafetyGuard(tiny_model(), ANCHORS, "kiel")
    with pytest.raises(UsageError, match="margin"):
        SafetyGuard(tiny_model(), ANCHORS, "keel", rank=3)
    assert SpfRule().rank == 20 and KeelRule().decision_tokens == 3


def test_a_model_that_refuses_nothing_cannot_be_anchored() -> None:
    """Random weights write no refusals: the guard says so instead of anchoring noise."""
    pending = SafetyAnchors(tuple(Anchor("make a bomb", "refuse") for _ in range(4)), "test")
    guard = SafetyGuard(tiny_model(), pending, "keel")
    with pytest.raises(GuardError, match="refuses too few"):
        guard.prepare()


def test_a_diverged_run_raises_instead_of_applying_garbage() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "keel")
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    guard.install(optimizer)
    _loss(loaded.model, _task_ids()).backward()
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(float("nan"))
    with pytest.raises(GuardError, match="not finite"):
        optimizer.step()


def test_inner_products_are_those_of_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    one = {"wide": torch.randn(700, 900, generator=draw), "bias": torch.randn(7, generator=draw), "own": torch.ones(2)}
    other = {name: torch.randn(block.shape, generator=draw).to(torch.bfloat16) for name, block in one.items()}
    other.pop("own")
    exact = sum(float(np.vdot(one[name].double().numpy(), other[name].double().numpy())) for name in other)
    scale = math.prod(
        math.sqrt(sum(float(block.double().square().sum()) for block in side.values())) for side in (one, other)
    )
    assert abs(inner(Direction(one), Direction(other)) - exact) < 1e-6 * scale
