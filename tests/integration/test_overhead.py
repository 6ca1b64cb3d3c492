"""What the default guard adds to a step on the demo model's shape, in counted operations, against the promised bars.

Counts are the same on every machine. Time is not tested: `benchmarks/overhead.py` measures it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS

from trimtab import models
from trimtab.anchors import SafetyAnchors
from trimtab.tuning import anchor_gradients
from trimtab.tuning.pools import build_pools, reader_for

REPLIES = {"refuse": "I can't help with that.", "answer": "Here is a short answer."}


def _benchmark(name: str) -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    return _benchmark("overhead_count")


def test_watching_a_calm_run_holds_its_bars_and_a_look_costs_more_than_a_glance(counting: ModuleType) -> None:
    loaded = models.load("demo")
    bundled = SafetyAnchors.bundled(30)
    anchors = replace(bundled, anchors=tuple(replace(one, reply=REPLIES[one.side]) for one in bundled.anchors))
    pools = build_pools(loaded, anchors, counting.RULE.decision_tokens)
    counting.RULE.prepare(reader_for(loaded, loaded.model), pools)
    model = counting.without_storage(loaded.model.config)
    glance, look, act = (
        counting.mean_count(model, pools, what, draws=2) for what in (counting.glance, counting.look, counting.act)
    )
    short, long = (counting.count(partial(counting.task_step, model, tokens)) for tokens in (1024, 4096))
    assert 3 * 2 * loaded.model.num_parameters() * 1024 == pytest.approx(short, rel=0.1)  # a step is about 6 N tokens
    assert long == pytest.approx(4 * short, rel=1e-3)
    assert 0 < glance < look < act
    assert glance <= 0.05 * short and glance <= 0.02 * long
    assert look <= 0.10 * short and act <= 0.28 * short  # no bar: so that a rise is seen


def test_every_row_of_the_timed_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: that it runs, not what it says of time."""
    timed = _benchmark("overhead")
    monkeypatch.setattr(anchor_gradients, "LEAST_TOKENS", anchor_gradients.LEAST_TOKENS)  # put back afterwards
    for variant in timed.VARIANTS:
        found = timed.measure(tiny_model(), variant, tokens=64, pairs=1, anchors=ANCHORS)
        assert len(found["unguarded"]) == len(found["guarded"]) == 1
        assert variant in timed.table([found])
