"""Scoring only the supervised positions changes the cost of TRL's loss, not its value or its gradient."""

from __future__ import annotations

import torch
from tests.tiny import tiny_model

from trimtab.tuning.trl_on_cpu import supervised_positions_only


def test_same_loss_and_gradients() -> None:
    from trl.trainer import utils

    results = []
    for compact in (False, True):
        model = tiny_model().model
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        ids = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(0))
        labels = ids.masked_fill(torch.arange(9) < 6, -100)
        if compact:
            with supervised_positions_only() as switched:
                assert switched
                output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        else:
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        output.loss.backward()
        results.append((output.loss, output.log_probs, [p.grad for p in model.parameters()]))
    (loss, log_probs, gradients), (other_loss, other_log_probs, other_gradients) = results
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(log_probs, other_log_probs)
    for mine, theirs in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_switch_is_put_back() -> None:
    from trl.trainer import utils

    before = utils._use_triton
    with supervised_positions_only():
        assert utils._use_triton is not before
    assert utils._use_triton is before
