"""After the last update: calm ends it at once; without calm the parameters become the mean of the later rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.unit.tuning.test_keel_glances import RULE, Run

from trimtab.errors import UsageError
from trimtab.tuning.keel import KeelRule


def watched(run: Run) -> list[list[np.ndarray]]:
    """Every round's parameters, as they are after its correction."""
    seen: list[list[np.ndarray]] = []
    hold = run.guard.rule._hold  # type: ignore[attr-defined]

    def keep(step: object, *counts: int) -> object:
        report = hold(step, *counts)
        seen.append([parameter.detach().numpy().copy() for parameter in run.loaded.model.parameters()])
        return report

    run.guard.rule._hold = keep  # type: ignore[attr-defined]
    return seen


def test_without_calm_the_parameters_are_the_mean_of_the_second_half() -> None:
    run = Run(0.0, KeelRule(**RULE, settle_rounds=6, margin=1e-6, largest_shift=0.02))
    run.step()
    run.disturb()
    seen = watched(run)
    run.guard.finish()
    run.patch.undo()
    *rounds, final = run.guard.history[-7:]
    assert len(seen) == 6 and all(report.acted for report in rounds)
    for place, parameter in enumerate(run.loaded.model.parameters()):
        expected = np.mean([values[place] for values in seen[3:]], axis=0)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-6)
        assert seen[3][place].tolist() != seen[5][place].tolist() or not np.any(seen[3][place])
    assert final.acted == () and final.shift == 0.0  # the log ends with what the mean itself shows
    pools = run.guard.pools
    with torch.no_grad():
        losses = {side: run.guard.reader.losses(pool.rows) for side, pool in pools.items()}
    for side, pool in pools.items():
        excess = (losses[side] - pool.references(range(len(pool.rows)))).clamp_min(0).mean()
        assert abs(final.excess[side] - float(excess)) < 1e-5  # both anchors of a side were read


def test_calm_ends_it_and_leaves_the_parameters_alone() -> None:
    run = Run(0.0, KeelRule(**RULE, settle_rounds=6, settle_calm=3))
    run.step()
    before = [parameter.detach().clone() for parameter in run.loaded.model.parameters()]
    seen = watched(run)
    run.guard.finish()
    run.patch.undo()
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, run.loaded.model.parameters(), strict=True))


def test_calm_at_the_very_end_is_calm_too() -> None:
    """Corrections first, then calm within the rounds: the last state stands, not a mean with what came before."""
    run = Run(0.0, KeelRule(**RULE, settle_rounds=200, margin=0.5))
    run.step()
    run.disturb()
    seen = watched(run)
    run.guard.finish()
    run.patch.undo()
    assert 3 < len(seen) < 200 and run.guard.history[-len(seen)].acted
    assert all(
        np.array_equal(a.detach().numpy(), b) for a, b in zip(run.loaded.model.parameters(), seen[-1], strict=True)
    )


def test_rounds_of_zero_and_one_change_nothing_by_averaging() -> None:
    for rounds in (0, 1):
        run = Run(0.0, KeelRule(**RULE, settle_rounds=rounds, margin=1e-6))
        run.step()
        run.disturb()
        seen = watched(run)
        run.guard.finish()
        run.patch.undo()
        assert len(seen) == rounds
        if seen:
            assert all(np.array_equal(a.detach().numpy(), b)
                       for a, b in zip(run.loaded.model.parameters(), seen[-1], strict=True))  # fmt: skip


@pytest.mark.parametrize(("rows", "read"), [(1, 1), (5, 2)])
def test_a_settling_look_reads_its_own_number_of_anchors(rows: int, read: int) -> None:
    run = Run(0.0, KeelRule(**RULE, settle_rounds=3, settle_rows=rows, margin=1.0))
    run.step()
    cursors = {side: pool.cursor for side, pool in run.guard.pools.items()}
    run.guard.finish()
    run.patch.undo()
    for side, pool in run.guard.pools.items():
        assert len(pool) == 2 and pool.cursor == (cursors[side] + 3 * read) % 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("rows", 0), ("answer_rows", -1), ("margin", float("nan")), ("margin", float("inf")), ("check_every", 0),
     ("settle_rounds", -1), ("settle_rows", 0), ("settle_calm", 0), ("calm_rows", 0), ("calm_after", -1),
     ("largest_shift", 0.0), ("decision_tokens", 0)],
)  # fmt: skip
def test_a_setting_under_which_the_guard_would_not_act_is_refused(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        KeelRule(**{option: value})
