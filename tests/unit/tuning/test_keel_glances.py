"""keel's glances: what is read and when, what follows a glance that is not calm, and what a resume keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids

from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.patient import PatientKeelRule

RULE = {"rows": 2, "answer_rows": 2, "calm_rows": 1, "calm_after": 3, "target": "words"}


class Run:
    """A guarded run on a tiny model, step by step; ``reads``: rows of each anchor pass and whether it kept a graph."""

    def __init__(self, lr: float, rule: KeelRule) -> None:
        self.loaded = tiny_model()
        self.optimizer = torch.optim.SGD(self.loaded.model.parameters(), lr=lr)
        self.guard = SafetyGuard(self.loaded, ANCHORS, rule)
        self.handle = self.guard.install(self.optimizer)
        self.reads: list[tuple[int, bool]] = []
        reader, losses = type(self.guard.reader), type(self.guard.reader).losses

        def watched(this: object, rows: list[object]) -> torch.Tensor:
            self.reads.append((len(rows), torch.is_grad_enabled()))
            return losses(this, rows)  # type: ignore[arg-type]

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(reader, "losses", watched)

    def step(self) -> None:
        self.reads.clear()
        _loss(self.loaded.model, _task_ids()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def disturb(self) -> None:
        """Move the model far from where its anchors' references were measured."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.loaded.model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def still() -> Iterator[Run]:
    """Nothing drifts: the learning rate is zero."""
    run = Run(0.0, KeelRule(**RULE))
    yield run
    run.patch.undo()
    run.handle.remove()


def test_after_calm_looks_a_step_costs_one_forward_over_few_anchors(still: Run) -> None:
    for _ in range(3):
        still.step()
        assert still.reads == [(2, True), (2, True)]
    for _ in range(4):
        still.step()
        assert still.reads == [(2, False)]  # one of each side, no graph
    assert still.guard.counters.acted == 0
    assert set(still.guard.history[-1].excess) == {"refuse", "answer"}
    # 3 looks at both anchors of a side, then 4 at one: the rotation went on
    assert {pool.cursor for pool in still.guard.pools.values()} == {(3 * 2 + 4) % 2}


def test_a_glance_that_is_not_calm_is_followed_by_a_whole_look_in_the_same_step(still: Run) -> None:
    for _ in range(5):
        still.step()
    still.disturb()
    still.step()
    assert still.reads[:3] == [(2, False), (2, True), (2, True)]
    assert still.guard.history[-1].acted and still.guard.history[-1].shift > 0
    still.disturb()
    still.step()
    assert still.reads[0] == (2, True)  # no glance until it has been calm again


def test_a_drift_between_half_the_margin_and_the_margin_is_not_calm_and_not_corrected() -> None:
    rule = KeelRule(**RULE, margin=1e9)
    run = Run(0.0, rule)
    for _ in range(4):
        run.step()
    run.disturb()
    excess = {side: float((run.guard.reader.measure(pool.rows) - pool.reference).clamp_min(0).mean())
              for side, pool in run.guard.pools.items()}  # fmt: skip
    rule.margin = 1.5 * max(excess.values())
    run.step()
    assert run.reads[-2:] == [(2, True), (2, True)] and not run.guard.history[-1].acted
    run.patch.undo()
    run.handle.remove()


@pytest.mark.parametrize("kind", [KeelRule, PatientKeelRule])
def test_a_resumed_run_is_as_calm_as_it_was(kind: type[KeelRule]) -> None:
    run = Run(0.0, kind(**RULE))
    for _ in range(4):
        run.step()
    other = SafetyGuard(tiny_model(), ANCHORS, kind(**RULE))
    other.load_state_dict(run.guard.state_dict())
    assert other.rule.tensors().keys() == run.guard.rule.tensors().keys()
    for name, value in run.guard.rule.tensors().items():
        assert torch.equal(other.rule.tensors()[name], value)
    assert int(other.rule.tensors()["calm_looks"]) >= 3
    run.patch.undo()
    run.handle.remove()
