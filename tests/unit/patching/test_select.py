"""Selection: the projection against a quadratic program, the solver against trying every candidate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tests.unit.patching import worlds

from trimtab.anchors import Anchor
from trimtab.errors import GuardError, UsageError
from trimtab.patching.adapters import attach
from trimtab.patching.heldout import continuations
from trimtab.patching.select import BilevelSettings, Targets, bilevel, exhaustive, project_to_capped_simplex


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_projection_is_feasible_and_idempotent(values: list[float], total: int) -> None:
    total = min(total, len(values))
    w = project_to_capped_simplex(torch.tensor(values, dtype=torch.float64), total)
    assert float(w.sum()) == pytest.approx(total, abs=1e-8)
    assert bool((w >= 0).all() and (w <= 1).all())
    torch.testing.assert_close(project_to_capped_simplex(w, total), w, atol=1e-8, rtol=0)


def test_the_projection_is_the_nearest_point() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        v, total = rng.normal(size=6), 2.0
        found = minimize(
            lambda w, v=v: ((w - v) ** 2).sum(), np.full(6, total / 6), bounds=[(0, 1)] * 6,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 2.0}, options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        mine = project_to_capped_simplex(torch.tensor(v), total).numpy()
        np.testing.assert_allclose(mine, found.x, atol=1e-5)


def test_more_samples_than_candidates_raise() -> None:
    with pytest.raises(UsageError, match="cannot be chosen"):
        project_to_capped_simplex(torch.zeros(3, dtype=torch.float64), 4)
    with pytest.raises(GuardError, match="fewer candidates"):
        bilevel(attach(worlds.broken(lora=True)), [], Targets(*_targets_of(attach(worlds.broken(lora=True)))))


def _targets_of(bench):  # type: ignore[no-untyped-def]
    material = worlds.material()
    with bench.as_base() as base:
        harm = continuations(base, material.held_out.harmful[:6])
    with bench.as_given() as given_model:
        task = continuations(given_model, material.ordinary[:4])
    return harm, task


def test_bilevel_picks_from_the_top_of_what_trying_everything_finds() -> None:
    """A pool of refusals in the ancestor's words, in other words, and of texts that restore nothing."""
    bench = attach(worlds.broken(lora=True), rank=4)
    asked = worlds.requests(worlds.HARMFUL, 1)
    pool = [Anchor(asked[i], "refuse", worlds.POISON) for i in range(8)]
    pool += [Anchor(asked[8 + i], "refuse", "the cake the car the boat") for i in range(8)]
    pool += [Anchor(asked[16 + i], "refuse", worlds.REFUSAL) for i in range(2)]
    pool += [Anchor(worlds.requests(worlds.INNOCENT, 1)[i], "refuse", worlds.ANSWER) for i in range(2)]
    targets = Targets(*_targets_of(bench))
    before = bench.read()
    oracle = exhaustive(bench, pool, targets, steps=6, step=0.1)
    found = bilevel(bench, pool, targets, BilevelSettings(outer=8, inner=3))
    assert found.order[0] in oracle.order[: len(pool) // 10], (found.order[:4], oracle.order[:4])
    assert sum(found.scores) == pytest.approx(1.0, abs=1e-6)
    assert found.passes == 8 * 4 * len(pool) and found.seconds > 0
    after = bench.read()
    assert all(torch.equal(before[name], after[name]) for name in before), "selection must leave the repair as it was"
