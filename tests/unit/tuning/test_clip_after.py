"""Clipping what a rule leaves of the gradient, instead of what it is given: a raw loop, a trainer, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids
from tests.unit.tuning.test_trainers import COMMON

from trimtab.errors import UsageError
from trimtab.models import LoadedModel
from trimtab.tuning.callback import SafetyGuardCallback
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.options import GuardArguments


def _weights(loaded: LoadedModel) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in loaded.model.parameters()])


def _moved(rule: str, clip_norm: float | None, clip_before: float | None = None, **options: object) -> np.ndarray:
    """The update of one step of plain gradient descent at rate 1: the gradient that the optimizer was left with."""
    loaded = tiny_model()
    before = _weights(loaded)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=1.0)
    with SafetyGuard(loaded, ANCHORS, rule, clip_norm=clip_norm, **options).attach(optimizer):
        _loss(loaded.model, _task_ids()).backward()
        if clip_before is not None:
            torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), clip_before)
        optimizer.step()
    return before - _weights(loaded)


@pytest.mark.parametrize(("rule", "options"), [("mixing", {"weight": 50.0}), ("spf", {"rank": 2}), ("a-gem", {})])
def test_what_the_rule_leaves_is_clipped_as_a_whole(rule: str, options: dict[str, object]) -> None:
    whole = _moved(rule, None, **options)
    length = float(np.linalg.norm(whole))
    limit = 0.3 * length
    np.testing.assert_allclose(_moved(rule, limit, **options), whole * (limit / length), atol=1e-5 * length)
    np.testing.assert_allclose(_moved(rule, 2 * length, **options), whole, atol=1e-6 * length)


def test_clipping_before_the_rule_is_something_else() -> None:
    before = _moved("mixing", None, clip_before=0.1, weight=50.0)
    after = _moved("mixing", 0.1, weight=50.0)
    assert np.linalg.norm(after) == pytest.approx(0.1, rel=1e-4) and np.linalg.norm(before) > 1.0


def test_a_trainer_leaves_its_clipping_to_the_guard_and_has_it_back(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    loaded = tiny_model()
    before = _weights(loaded)
    settings: dict[str, Any] = {**COMMON, "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.01}
    args = SFTConfig(output_dir=str(tmp_path), lr_scheduler_type="constant", **settings)
    callback = SafetyGuardCallback(ANCHORS, "mixing", clip_after=True, weight=50.0)
    rows = [{"text": f"route this {word} today"} for word in ("cake", "base", "day", "weather")]
    trainer = SFTTrainer(
        model=loaded.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert np.linalg.norm(before - _weights(loaded)) == pytest.approx(0.01, rel=1e-3)
    assert args.max_grad_norm == 0.01
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert logged and logged[0] > 0.01, "the trainer measures still, and measures the task's gradient"


def test_the_flag_belongs_to_rules_of_the_gradient(tmp_path: Path) -> None:
    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("".join(json.dumps(vars(anchor)) + "\n" for anchor in ANCHORS.anchors))
    callback = GuardArguments(guard="spf", guard_clip_after=True, guard_anchors=str(anchors)).callback("demo")
    assert callback is not None and callback.clip_after and "clip_after" not in callback.options
    with pytest.raises(UsageError, match="no option --guard_clip_after"):
        GuardArguments(guard="keel", guard_clip_after=True).callback("demo")
