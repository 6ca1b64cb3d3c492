"""keel's corrections from factors against the same ones from whole gradients; what falls back to whole ones."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS
from torch import Tensor, nn

from trimtab.gradients.direction import Direction
from trimtab.gradients.factors import recorded
from trimtab.models import LoadedModel
from trimtab.tuning import anchor_gradients, keel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.rules import Report, Step

WIDTH = 192  # its matrices are larger than the factors of the anchors' two dozen tokens


def _trained(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Direction]:
    """Six guarded steps on random tokens; what was corrected along."""
    found: list[Direction] = []
    own = anchor_gradients.direction_of

    def kept(*arguments: Any) -> Direction:
        found.append(own(*arguments))
        return found[-1]

    monkeypatch.setattr(keel, "direction_of", kept)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.05)
    guard = SafetyGuard(loaded, ANCHORS, "keel", margin=1e-4, settle_rounds=2, **options)
    handle = guard.install(optimizer)
    for rows in torch.randint(4, 30, (6, 4, 10), generator=torch.Generator().manual_seed(3)):
        loaded.model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    guard.finish()
    return found


@pytest.mark.parametrize("options", [{}, {"spare": True}, {"autocast": torch.float16}])
def test_factors_correct_as_whole_gradients_do(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    by_factors = tiny_model(width=WIDTH)
    whole = LoadedModel(copy.deepcopy(by_factors.model), by_factors.tokenizer, "whole")
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    from_factors = _trained(by_factors, monkeypatch, **options)
    monkeypatch.setattr(anchor_gradients, "LEAST_TOKENS", 10**9)
    from_whole = _trained(whole, monkeypatch, **options)
    assert from_factors and all(direction.factored for direction in from_factors)
    assert from_whole and not any(direction.factored for direction in from_whole)
    tolerance = 1e-4 if "autocast" in options else 1e-5  # float16 rounds the whole gradients
    for (name, mine), theirs in zip(by_factors.model.named_parameters(), whole.model.parameters(), strict=True):
        assert not torch.equal(mine, start[name])
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=1e-3)


def test_factors_are_kept_only_where_they_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model(width=WIDTH)
    shapes = {name: p.shape for name, p in loaded.model.named_parameters()}
    for direction in _trained(loaded, monkeypatch):
        assert {name for name in shapes if shapes[name] == (WIDTH, WIDTH)} <= set(direction.factored)
        assert "model.norm.weight" in direction.dense
        for name, factors in direction.factored.items():
            assert factors.D.numel() + factors.X.numel() < shapes[name].numel()


def test_small_blocks_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA: hooks would cost more than they spare."""
    found = _trained(tiny_model(), monkeypatch)
    assert found and not any(direction.factored for direction in found)


class Functional(nn.Module):
    """A layer whose weight is used without calling it, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, data: Tensor) -> Tensor:
        return F.linear(self.called(data), self.used.weight, self.used.bias)


def test_a_weight_used_without_its_module_is_not_lost() -> None:
    model, data = Functional(), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with recorded(model) as record:
        loss = model(data).square().mean()
    found = record.gradient(loss)
    model(data).square().mean().backward()
    assert set(found.factored) == {"called.weight"}
    torch.testing.assert_close(found.dense["used.weight"], model.used.weight.grad)
    torch.testing.assert_close(found.factored["called.weight"].dense(), model.called.weight.grad)


def test_blocks_without_a_task_gradient_do_not_weaken_the_projection() -> None:
    """What is left of the task gradient has no component against an anchor's, over the blocks that it has."""
    draw = torch.Generator().manual_seed(5)
    trained = {name: nn.Parameter(torch.zeros(4)) for name in ("both", "anchors-only")}
    trained["both"].grad = gradient = torch.randn(4, generator=draw)
    anchors = [Direction({name: torch.randn(4, generator=draw) for name in trained}) for _ in range(2)]
    if float(gradient @ anchors[0].dense["both"]) > 0:
        gradient.neg_()
    expected = gradient.clone()
    for anchor in anchors:
        block = anchor.dense["both"]
        expected -= min(float(expected @ block), 0.0) / float(block @ block) * block
    step = Step(None, trained, {}, nullcontext(), 0)  # type: ignore[arg-type]
    keel.KeelRule()._correct(step, anchors, [0.1, 0.1], [], Report())
    torch.testing.assert_close(trained["both"].grad, expected)
    assert trained["anchors-only"].grad is None and trained["anchors-only"].abs().sum() > 0
