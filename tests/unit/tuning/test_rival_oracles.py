"""Mixing, Lisa and Constrained SFT against computations of their formulas that share no code with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids
from tests.unit.tuning.test_trainers import COMMON

from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.pools import TokenisedAnchor
from trimtab.tuning.rivals.constrained import trainer_class


def _cross_entropy(model: Any, rows: list[TokenisedAnchor]) -> torch.Tensor:
    """Mean over the anchors of their mean loss a supervised token; each is read alone and unpadded."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.prompt + row.reply])).logits[0]
        places = range(len(row.prompt) - 1, len(row.prompt) + len(row.reply) - 1)
        losses.append(-sum(logits[p].log_softmax(-1)[t] for p, t in zip(places, row.reply, strict=True)) / len(places))
    return sum(losses) / len(losses)  # type: ignore[return-value]


def _gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_mixing_is_the_task_s_gradient_plus_the_weighted_anchors_in_rotation(weight: float) -> None:
    loaded, other = tiny_model(), tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "mixing", weight=weight, rows=1)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    with guard.attach(optimizer):
        for index in range(3):
            _loss(loaded.model, _task_ids()).backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = _loss(other.model, _task_ids())
            for side in ("refuse", "answer"):
                rows = guard.pools[side].rows  # type: ignore[index]
                loss = loss + weight * _cross_entropy(other.model, [rows[index % len(rows)]])
            for parameter, gradient in zip(other.model.parameters(), _gradients(other.model, loss), strict=True):
                parameter.data.sub_(0.1 * gradient)
            for mine, theirs in zip(loaded.model.parameters(), other.model.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_mixing_reaches_parameters_that_the_task_does_not() -> None:
    loaded = tiny_model(tied=False)
    guard = SafetyGuard(loaded, ANCHORS, "mixing", rows=2)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    head = loaded.model.lm_head.weight
    before = head.detach().clone()
    guard.prepare()
    anchors = sum(_cross_entropy(loaded.model, pool.rows) for pool in guard.pools.values())
    gradient = torch.autograd.grad(anchors, head)[0]  # type: ignore[arg-type]
    with guard.attach(optimizer):
        loaded.model.get_input_embeddings()(_task_ids()).square().sum().backward()  # the head has no task gradient
        optimizer.step()
    torch.testing.assert_close(head.detach(), before - 0.1 * gradient, atol=1e-6, rtol=1e-5)


def test_lisa_s_whole_schedule_is_its_formula() -> None:
    """Two steps of alignment, three of the task, over two cycles; the proximal term off for the first six steps."""
    loaded, other = tiny_model(), tiny_model()
    settings: dict[str, Any] = {"align_steps": 2, "task_steps": 3, "rho": 0.7, "free_steps": 6, "rows": 1}
    guard = SafetyGuard(loaded, ANCHORS, "lisa", **settings, largest_norm=1.0)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.05)
    ends: dict[str, list[torch.Tensor]] = {}
    aligned, last = 0, "align"
    with guard.attach(optimizer):
        for index in range(12):
            state = "align" if index % 5 < 2 else "task"
            weights = [p.detach().clone() for p in other.model.parameters()]
            if state != last:
                ends[last] = weights
            _loss(loaded.model, _task_ids()).backward()
            optimizer.step()
            optimizer.zero_grad()

            loss = _loss(other.model, _task_ids())
            if state == "align":
                loss, aligned = _cross_entropy(other.model, [guard.pools["refuse"].rows[aligned % 2]]), aligned + 1
            proximal = index >= 6
            if proximal:
                anchor = ends["task" if state == "align" else "align"]
                pairs = zip(other.model.parameters(), anchor, strict=True)
                loss = loss + 0.7 / 2 * sum((p - end).square().sum() for p, end in pairs)
            gradients = _gradients(other.model, loss)
            norm = torch.sqrt(sum(g.double().square().sum() for g in gradients))  # type: ignore[arg-type]
            clips = state == "align" or proximal  # a plain task step was clipped by the trainer already
            scale = min(1.0, float(1.0 / (norm + 1e-6))) if clips else 1.0
            for parameter, gradient in zip(other.model.parameters(), gradients, strict=True):
                parameter.data.sub_(0.05 * scale * gradient)
            for mine, theirs in zip(loaded.model.parameters(), other.model.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-4, msg=lambda m, i=index: f"step {i}: {m}")
            last = state
    acted = [bool(report.acted) for report in guard.history]
    assert acted == [index % 5 < 2 for index in range(12)]


def test_lisa_s_proximal_term_is_off_for_the_first_tenth_of_a_known_total() -> None:
    """rho is so large that the term, where it is on, makes the clipped step point at where alignment ended."""
    loaded = tiny_model()
    guard = SafetyGuard(loaded, ANCHORS, "lisa", align_steps=1, task_steps=99, rho=1e6, rows=1)
    guard.total_steps = 40
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.01)
    with guard.attach(optimizer):
        for index in range(6):
            before = next(loaded.model.parameters()).detach().clone()
            _loss(loaded.model, _task_ids()).backward()
            plain = next(loaded.model.parameters()).grad.clone()  # type: ignore[union-attr]
            optimizer.step()
            moved = (before - next(loaded.model.parameters()).detach()) / 0.01
            optimizer.zero_grad()
            if index >= 1:
                assert torch.allclose(moved, plain, atol=1e-3) == (index < 4), index


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _paper_loss(tuned: np.ndarray, aligned: np.ndarray, labels: np.ndarray, count: int) -> float:
    """arXiv 2406.05946, token by token: S(beta_t, logp - logp_aligned) times the cross-entropy; logits in float64."""
    total = 0.0
    for row in range(len(labels)):
        answer = [t for t in range(labels.shape[1]) if labels[row, t] != -100]
        for place, t in enumerate(answer, 1):
            beta = 0.1 * (5 if place == 1 else 20 if place <= 5 else 1)
            now = _log_softmax(tuned[row, t - 1])[labels[row, t]]
            then = _log_softmax(aligned[row, t - 1])[labels[row, t]]
            weight = max(1e-3, 2 * (1 - 1 / (1 + np.exp(-beta * (now - then)))))
            total += -weight * now
    return total / count


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_constrained_sft_s_loss_is_the_paper_s(lora: bool, tmp_path: Path) -> None:
    from trl import SFTConfig

    loaded, aligned = tiny_model(), tiny_model()
    rows = [{"prompt": "route this", "completion": text} for text in ("billing", "nice weather today here is the cake")]
    trainer = trainer_class()(
        model=loaded.model, args=SFTConfig(output_dir=str(tmp_path), **COMMON), train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    if not lora:
        trainer.aligned = aligned.model
    with torch.no_grad():  # the model has left the aligned one, by far enough that the weights differ
        for index, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"].numpy()
    assert labels.shape[0] == 2 and (batch["attention_mask"] == 0).any() and max((labels != -100).sum(1)) > 5
    given = {key: value for key, value in batch.items() if key != "labels"}
    trainer.model.eval()
    with torch.no_grad():
        tuned = trainer.model(**given).logits.double().numpy()
        then = aligned.model(**given).logits.double().numpy()
    for items in (None, torch.tensor(37)):
        count = int((labels != -100).sum()) if items is None else 37
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        assert float(loss) == pytest.approx(_paper_loss(tuned, then, labels, count), rel=1e-4)
    plain = -sum(
        _log_softmax(tuned[r, t - 1])[labels[r, t]]
        for r in range(2) for t in range(labels.shape[1]) if labels[r, t] != -100
    ) / (labels != -100).sum()  # fmt: skip
    assert abs(plain - _paper_loss(tuned, then, labels, int((labels != -100).sum()))) > 0.01  # the weights do something


def test_constrained_sft_s_loss_is_a_mean_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count that is handed over is of all processes, and DDP divides by their number once more."""
    from trl import SFTConfig

    loaded = tiny_model()
    trainer = trainer_class()(
        model=loaded.model, args=SFTConfig(output_dir=str(tmp_path), **COMMON), processing_class=loaded.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "route this", "completion": "billing"}] * 2),
    )  # fmt: skip
    trainer.aligned = tiny_model().model
    batch = next(iter(trainer.get_train_dataloader()))
    alone = float(trainer.compute_loss(loaded.model, dict(batch), num_items_in_batch=torch.tensor(8)))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 4))
    together = float(trainer.compute_loss(loaded.model, dict(batch), num_items_in_batch=torch.tensor(8)))
    assert together == pytest.approx(4 * alone)
