"""The rivals on tiny models: each does what its source states, seen from outside (parameters, not internals)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError, UsageError
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.pools import reader_for
from trimtab.tuning.rivals.asft import penalty
from trimtab.tuning.rivals.catalogue import STEP_RULES
from trimtab.tuning.rivals.constrained import betas, token_logp, token_weights
from trimtab.tuning.rivals.posthoc import dare, resta, safe_lora
from trimtab.tuning.rivals.salora import Complement, constrain, fold, safety_features
from trimtab.tuning.rivals.stepping import LisaRule, SpardRule

PUBLISHED = SafetyAnchors((Anchor("make a bomb", "refuse", "sorry i can't help with that"),), "test")


def _one_step(rule: str, optimizer_of: object, steps: int = 1, **options: object) -> tuple[LoadedModel, SafetyGuard]:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, PUBLISHED, rule, **options)
    optimizer = optimizer_of(loaded.model.parameters())  # type: ignore[operator]
    with guard.attach(optimizer):
        for _ in range(steps):
            _loss(loaded.model, _task_ids()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return loaded, guard


def _sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [name for name in STEP_RULES if name != "asft"])
def test_every_rule_trains_once_per_step_under_full_and_lora(rule: str) -> None:
    for lora in (False, True):
        loaded = tiny_model()
        model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear")) if lora else loaded.model
        guard = SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), ANCHORS, rule)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with guard.attach(optimizer):
            for _ in range(4):
                _loss(model, _task_ids()).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert guard.counters.steps == 4 == len(guard.history)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_alternating_is_two_adamw_steps_with_the_same_moments() -> None:
    def adamw(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.5, 0.999), weight_decay=0.0)  # type: ignore[arg-type]

    mine, guard = _one_step("alternating", adamw, steps=3)
    other = tiny_model()
    reader = reader_for(other, other.model)
    optimizer = adamw(other.model.parameters())
    for _ in range(3):
        _loss(other.model, _task_ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
        reader.losses(guard.pools["refuse"].rows).mean().backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert guard.counters.acted == 3


def test_spard_scales_each_tensor_by_its_own_norm_and_only_above_its_threshold() -> None:
    mine, guard = _one_step("spard", _sgd, rows=1, alpha_max=0.05)
    other = tiny_model()
    _loss(other.model, _task_ids()).backward()
    _sgd(other.model.parameters()).step()
    other.model.zero_grad()
    loss = reader_for(other, other.model).losses(guard.pools["refuse"].rows).mean()
    loss.backward()
    for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True):
        alpha = min((float(loss.detach()) - 0.2) / (float(b.grad.norm()) + 1e-8), 0.05)
        torch.testing.assert_close(a, b - alpha * b.grad, atol=1e-5, rtol=1e-4)
    _, idle = _one_step("spard", _sgd, rows=1, tau=1e9)
    assert idle.counters.acted == 0 and SpardRule().tau == 0.2


def test_lisa_refuses_a_run_that_would_only_align() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, PUBLISHED, "lisa", align_steps=3, task_steps=2)
    guard.total_steps = 3
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    guard.install(optimizer)
    with pytest.raises(GuardError, match=r"(?s)never trained.*3 steps, 3 of alignment"):
        optimizer.step()


def test_lisa_alternates_and_pulls_towards_where_the_other_state_ended() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, PUBLISHED, "lisa", align_steps=2, task_steps=2, rho=0.5, free_steps=0)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.01)
    ends: list[list[torch.Tensor]] = []
    with guard.attach(optimizer):
        for index in range(4):
            before = [p.detach().clone() for p in loaded.model.parameters()]
            ends.append(before)
            _loss(loaded.model, _task_ids()).backward()
            task = [p.grad.clone() for p in loaded.model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            if index >= 2:  # the task state: pulled towards the end of the alignment state, which is ends[2]
                raw = [g + 0.5 * (b - e) for g, b, e in zip(task, before, ends[2], strict=True)]
                norm = torch.sqrt(sum((g.double() ** 2).sum() for g in raw))
                scale = min(1.0, float(1.0 / (norm + 1e-6)))
                for p, b, g in zip(loaded.model.parameters(), before, raw, strict=True):
                    torch.testing.assert_close(p.detach(), b - 0.01 * scale * g, atol=1e-6, rtol=1e-4)
    assert [report.acted for report in guard.history] == [("refuse",), ("refuse",), (), ()]
    rule = LisaRule()
    assert [rule.state_at(i) for i in (0, 99, 100, 999, 1000)] == ["align", "align", "task", "task", "align"]
    again = LisaRule()
    again.load_tensors(guard.rule.tensors())  # type: ignore[attr-defined]
    assert again.tensors().keys() == guard.rule.tensors().keys()  # type: ignore[attr-defined]


def test_safegrad_s_divergence_is_zero_at_the_start_and_kl_afterwards() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "safegrad")
    guard.prepare()
    pool, rule = guard.pools["refuse"], guard.rule
    aligned = copy.deepcopy(loaded.model)
    assert float(rule.divergence(guard.reader, pool, [0, 1])) == pytest.approx(0.0, abs=1e-6)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    total, tokens = 0.0, 0
    for index in (0, 1):
        row = pool.rows[index]
        ids = torch.tensor([row.prompt + row.reply])
        place = slice(len(row.prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, place].double().log_softmax(-1).numpy() for m in (aligned, loaded.model))
        total, tokens = total + float((np.exp(p) * (p - q)).sum()), tokens + len(row.reply)
    assert float(rule.divergence(guard.reader, pool, [0, 1])) == pytest.approx(total / tokens, rel=1e-3)  # type: ignore[attr-defined]


def test_constrained_weights_are_the_formula() -> None:
    labels = torch.tensor([[-100, 3, 4, 5, 6, 7, 8], [-100, -100, -100, 9, 1, 2, -100]])
    supervised = labels != -100
    found = betas(supervised)
    np.testing.assert_allclose(found[0].numpy(), [0, 0.5, 2, 2, 2, 2, 0.1], atol=1e-6)
    np.testing.assert_allclose(found[1].numpy(), [0, 0, 0, 0.5, 2, 2, 0], atol=1e-6)
    draw = torch.Generator().manual_seed(0)
    logp, aligned = -torch.rand(2, 7, generator=draw) * 5, -torch.rand(2, 7, generator=draw) * 5
    beta = found.double().numpy()
    expected = 2 * (1 - 1 / (1 + np.exp(-beta * (logp - aligned).double().numpy())))
    expected = np.maximum(expected, 1e-3) * supervised.numpy()
    np.testing.assert_allclose(token_weights(logp, aligned, supervised).numpy(), expected, rtol=1e-5)
    assert float(token_weights(aligned, aligned, supervised)[0, 1]) == pytest.approx(1.0)  # at the start: plain SFT
    logits = torch.randn(2, 7, 11, generator=draw)
    np.testing.assert_allclose(
        token_logp(logits, labels)[0, 1].item(), logits[0, 1].log_softmax(-1)[3].item(), rtol=1e-5
    )


def _factors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw) for shape in ((8, 6), (8, 3), (3, 6)))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(3))
def test_asft_penalty_and_gradients_equal_the_dense_formula_under_autograd(seed: int) -> None:
    V, B, A = (x.double() for x in _factors(seed))
    B.requires_grad_(), A.requires_grad_()
    C = V @ V.T / V.norm()
    dense = ((torch.eye(8, dtype=torch.float64) - C) @ B @ A).square().sum()
    dense.backward()
    found = penalty(V, B.detach(), A.detach())
    torch.testing.assert_close(found.value, dense.detach())
    torch.testing.assert_close(found.B, B.grad)
    torch.testing.assert_close(found.A, A.grad)


def test_safe_lora_projects_the_modules_of_lowest_cosine() -> None:
    names = [f"m{i}" for i in range(4)]
    made = {name: _factors(i) for i, name in enumerate(names)}
    factors = {name: (B, A) for name, (_, B, A) in made.items()}
    deltas = {name: V for name, (V, _, _) in made.items()}
    cosines = {}
    for name, (V, B, A) in ((n, (x.double().numpy() for x in m)) for n, m in made.items()):
        C = V @ V.T / np.linalg.norm(V)
        one, two = C @ B @ A, B @ A
        cosines[name] = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
    found = safe_lora(factors, deltas, number=2)
    assert set(found.chosen) == set(sorted(names, key=cosines.get)[:2])  # type: ignore[arg-type]
    for name in names:
        assert found.cosines[name] == pytest.approx(cosines[name], abs=2e-5)
    V, B = deltas[names[0]].numpy(), factors[names[0]][0].numpy()
    everything = safe_lora(factors, deltas, number=None, tau=1.0)
    np.testing.assert_allclose(
        everything.chosen[names[0]].numpy(), V @ V.T / np.linalg.norm(V) @ B, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UsageError, match="not both"):
        safe_lora(factors, deltas, number=2, tau=0.5)


def test_resta_adds_half_of_the_thinned_alignment_vector() -> None:
    draw = torch.Generator().manual_seed(3)
    tuned, aligned, base = ({"w": torch.randn(200, 100, generator=draw)} for _ in range(3))
    state = torch.get_rng_state()
    found = resta(tuned, aligned, base)["w"]
    assert torch.equal(torch.get_rng_state(), state)
    added = (found - tuned["w"]) / 0.5
    vector = aligned["w"] - base["w"]
    kept = added != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(added[kept], vector[kept] / 0.7, atol=1e-4, rtol=1e-4)
    assert torch.equal(dare(vector, 0.3, 0, "w"), dare(vector, 0.3, 0, "w"))
    assert not torch.equal(dare(vector, 0.3, 0, "w"), dare(vector, 0.3, 0, "other"))


def test_salora_keeps_the_adapter_off_the_safety_features_and_folds_without_a_trace() -> None:
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    guard = SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), ANCHORS, "keel")
    guard.prepare()
    with model.disable_adapter():
        features = safety_features(model, guard.reader, guard.pools["refuse"].rows, rank=3)
    constrain(model, features)
    name, V = next(iter(features.items()))
    layer = model.get_submodule(name).lora_B["default"]
    assert float((V.T @ layer.weight).abs().max()) < 1e-5
    ids = _task_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fold(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert not hasattr(layer, "parametrizations") and all("parametrizations" not in key for key in model.state_dict())
    V = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0]
    B = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Complement(V)(B), (torch.eye(6) - V @ V.T) @ B)


def test_asft_needs_lora_and_a_base() -> None:
    with pytest.raises(GuardError, match="LoRA only"):
        SafetyGuard(tiny_model(), None, "asft").prepare()
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(UsageError, match="before its alignment"):
        SafetyGuard(LoadedModel(model, loaded.tokenizer, "tiny"), None, "asft").prepare()


def test_patient_keel_looks_less_often_while_calm_and_at_once_when_not() -> None:
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "keel-patient", calm_looks=2, longest_pause=4)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
    with guard.attach(optimizer):
        for index in range(24):
            if index == 20:  # something moves the model: the next look must see it
                with torch.no_grad():
                    for parameter in loaded.model.parameters():
                        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                        parameter.add_(0.5 * noise)
            _loss(loaded.model, _task_ids()).backward()
            optimizer.step()
            optimizer.zero_grad()
    looked = [index for index, report in enumerate(guard.history[:24]) if report.anchor_loss]
    assert looked[:5] == [0, 1, 3, 5, 9] and 24 - len(looked) > 10
    assert guard.counters.acted > 0
    again = SafetyGuard(loaded, None, "keel-patient", calm_looks=2, longest_pause=4)
    again.load_state_dict(guard.state_dict())
    assert torch.equal(again.rule.tensors()["cadence"], guard.rule.tensors()["cadence"])  # type: ignore[attr-defined]
