"""Constrained SFT (arXiv 2406.05946): each token's loss is weighted by how far the model has left the aligned one.

    w_t = max(1e-3, 2 (1 - sigmoid(beta_t (logp_t - logp_aligned,t))))   detached, times the cross-entropy

beta is 0.1, 5 times that on the first token of an answer and 20 times on tokens two to five: the early tokens hardly
move. Covered: the weights, a TRL trainer that uses them. Not covered: packed rows, several answers in a row (positions
are counted from the first supervised token).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.precision import at_least_float32

BETA, FIRST, EARLY, EARLY_UNTIL, FLOOR = 0.1, 5.0, 20.0, 5, 1e-3


def betas(supervised: Tensor) -> Tensor:
    """beta of every position; ``supervised``: rows x positions, bool. 0 where nothing is supervised."""
    place = supervised.long().cumsum(1)  # 1 on the first supervised token
    factor = torch.where(place == 1, FIRST, torch.where(place <= EARLY_UNTIL, EARLY, 1.0))
    return BETA * factor * supervised


def token_weights(logp: Tensor, aligned: Tensor, supervised: Tensor) -> Tensor:
    """The weights (rows x positions), detached; 0 where nothing is supervised."""
    weight = 2 * torch.sigmoid(-betas(supervised) * (logp - aligned).detach())
    return weight.clamp_min(FLOOR) * supervised


def token_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label; rows x positions, 0 where the label is -100."""
    return -F.cross_entropy(at_least_float32(logits).transpose(1, 2), labels, ignore_index=-100, reduction="none")


def trainer_class() -> type:
    """TRL's trainer with this loss. A function, so that importing this module does not import TRL."""
    from trl import SFTTrainer

    class ConstrainedTrainer(SFTTrainer):  # type: ignore[misc]
        """``aligned``: a frozen copy of the model before training, or None where an adapter can be switched off."""

        aligned: Any = None

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")[:, 1:]
            supervised = labels != -100
            outputs = model(**inputs)
            logp = token_logp(outputs.logits[:, :-1], labels)
            inner = self.accelerator.unwrap_model(model)
            with torch.no_grad(), inner.disable_adapter() if self.aligned is None else nullcontext():
                reference = (self.aligned or model)(**inputs)
                aligned = token_logp(reference.logits[:, :-1], labels)
            total = -(token_weights(logp, aligned, supervised) * logp).sum()
            count = num_items_in_batch if num_items_in_batch is not None else supervised.sum()
            loss = total / count
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the count is of all processes, and DDP takes the mean
            return (loss, outputs) if return_outputs else loss

    return ConstrainedTrainer
