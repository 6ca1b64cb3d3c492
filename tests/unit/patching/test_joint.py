"""Joint steps against NumPy, Polyak's formula and a direct computation of what a step brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.unit.patching import worlds
from torch import nn

from trimtab.errors import GuardError
from trimtab.gradients.direction import Direction, Target, gram_of, joint_move, take_off
from trimtab.patching.adapters import Workbench, attach
from trimtab.patching.climb import LadderSettings, Lessons, lessons_by
from trimtab.patching.heldout import reply_logits
from trimtab.patching.joint import JointSteps
from trimtab.patching.ladder import repair
from trimtab.patching.recover import Lesson, Recipe
from trimtab.patching.texts import written_by

EXACT = Recipe(bf16=False, longest=1e9)


def lesson_of(bench: Workbench) -> Lessons:
    with bench.as_base() as base:
        return lessons_by(base, bench.loaded, written_by(base, worlds.material()), Recipe(bf16=False))


def test_the_move_solves_the_linearised_system_with_the_least_length() -> None:
    draw = np.random.default_rng(4)
    sides = [draw.normal(size=7), draw.normal(size=7)]
    parameter = nn.Parameter(torch.zeros(7))
    gradients = [Direction({"p": torch.tensor(value, dtype=torch.float32)}) for value in sides]
    move = joint_move(gram_of(gradients), [0.7, 0.4], longest=1e9)
    take_off([Target({"p": parameter}, move.multipliers)], gradients)
    matrix = np.stack(sides)
    expected = -np.linalg.pinv(matrix) @ np.array([0.7, 0.4])  # least norm with matrix @ x = -distances
    found = parameter.detach().numpy()
    assert np.allclose(found, expected, rtol=5e-3, atol=1e-3)  # the solver has a ridge of a thousandth
    assert move.length == pytest.approx(float(np.linalg.norm(found)), rel=1e-4)


def test_the_move_is_never_longer_than_allowed_and_keeps_its_direction() -> None:
    gradients = [Direction({"p": torch.tensor([3.0, 4.0])})]
    free, bounded = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    for parameter, longest in ((free, 1e9), (bounded, 0.5)):
        move = joint_move(gram_of(gradients), [50.0], longest)
        take_off([Target({"p": parameter}, move.multipliers)], gradients)
    assert move.length == pytest.approx(0.5)
    torch.testing.assert_close(bounded.detach(), 0.5 * free.detach() / free.detach().norm())
    torch.testing.assert_close(free.detach(), -50.0 * torch.tensor([3.0, 4.0]) / 25.0, rtol=2e-3, atol=0)


def test_a_step_on_one_side_is_polyaks() -> None:
    bench = attach(worlds.broken(lora=True), go_on=True)
    side = lesson_of(bench).refuse.first(4)
    trainer = JointSteps(bench.loaded, Lesson([]), EXACT)
    trainer.use(side, Lesson([]))
    before = bench.read()
    loss = side.distances(range(4), reply_logits(bench.loaded, side.rows)).mean()
    names = [name for name, p in bench.model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [bench.parameters[name] for name in names])
    squared = sum(float(g.double().square().sum()) for g in gradients)
    assert trainer.step() == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        expected = before[name] - float(loss.detach()) / squared * gradient
        # the solver has a ridge of a thousandth
        torch.testing.assert_close(bench.parameters[name].detach(), expected, rtol=5e-3, atol=1e-4)


def test_a_side_within_the_margin_does_not_move_anything() -> None:
    bench = attach(worlds.broken(lora=True), go_on=True)
    lessons, before = lesson_of(bench), bench.read()
    trainer = JointSteps(bench.loaded, Lesson([]), Recipe(bf16=False, margin=1e6))
    trainer.use(lessons.refuse, lessons.answer)
    assert trainer.step() > 0 and trainer.steps == 1
    assert all(torch.equal(value, before[name]) for name, value in bench.read().items())


def test_joint_steps_repair_a_broken_adapter_with_its_own_parameters() -> None:
    settings = LadderSettings(samples=(8,), last_steps=24, check_every=8, drift=0.5, lengths=())
    found = repair(worlds.broken(lora=True), worlds.material(), ancestor="base", settings=settings)
    assert found.status == "repaired" and found.chosen is not None
    assert found.given.compliance > 0.9 and found.chosen.look.compliance <= 0.05
    assert found.chosen.look.over_refusal is not None and found.chosen.look.over_refusal <= 0.05
    empty = [p for name, p in found.bench.parameters.items() if ".patch." in name and "lora_B" in name]
    assert empty and not any(bool(p.any()) for p in empty), "the given adapter itself was trained"


def test_a_distance_that_is_not_finite_raises() -> None:
    bench = attach(worlds.broken(lora=True), go_on=True)
    side = lesson_of(bench).refuse
    assert side.logits is not None
    spoilt = Lesson(side.rows, [torch.full_like(value, float("nan")) for value in side.logits])
    trainer = JointSteps(bench.loaded, Lesson([]), EXACT)
    trainer.use(spoilt, Lesson([]))
    with pytest.raises(GuardError, match="not finite"):
        trainer.step()
