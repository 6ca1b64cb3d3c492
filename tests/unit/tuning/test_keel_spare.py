"""A correction of the side that drifted does not raise the loss of the side that did not."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS

from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.keel import KeelRule


def rise_of_the_calm_side(target: str, spare: bool, seed: int) -> float:
    """Change of the calm side's mean loss by one short correction of the other, nats; both sides are read whole."""
    loaded = tiny_model()
    rule = KeelRule(rows=2, answer_rows=2, target=target, spare=spare, largest_shift=1e-3)
    guard = SafetyGuard(loaded, ANCHORS, rule)
    guard.prepare()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    step = guard._step()
    before = rule._seen(step, 2, 2)
    drifted, calm = sorted(before.excess, key=lambda side: -before.excess[side])
    rule.margin = (before.excess[drifted] + before.excess[calm]) / 2
    assert rule._hold(step, 2, 2).acted == (drifted,)
    after = rule._seen(step, 2, 2)
    assert after.excess[drifted] < before.excess[drifted]
    return after.anchor_loss[calm] - before.anchor_loss[calm]


@pytest.mark.parametrize("target", ["words", "decision"])
def test_the_calm_side_is_spared_to_first_order(target: str) -> None:
    free = [rise_of_the_calm_side(target, False, seed) for seed in range(4)]
    spared = [rise_of_the_calm_side(target, True, seed) for seed in range(4)]
    assert max(free) > 1e-4, free  # in some of them the two sides are opposed
    for loose, held in zip(free, spared, strict=True):
        if loose > 0:
            assert held < 0.1 * loose, (loose, held)
        else:  # nothing to spare: the same move
            assert held == pytest.approx(loose, abs=1e-6)
