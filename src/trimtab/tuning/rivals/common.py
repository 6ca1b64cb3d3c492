"""What the rivals share: the anchors' dense gradient, the distributions over their replies, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab import prefix
from trimtab.errors import GuardError
from trimtab.gradients.sums import squared_norm
from trimtab.precision import at_least_float32
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor
from trimtab.tuning.rules import Step, gradients_of, require_pool


class AnchorGradient(NamedTuple):
    """``loss``: nats per token (or the divergence). ``gradients``: by parameter name, of its shape."""

    loss: float
    gradients: dict[str, Tensor]


def anchor_gradient(step: Step, rows: int) -> AnchorGradient:
    """Dense gradient of the mean loss of the next ``rows`` refusals at the current parameters.

    Raises:
        GuardError: when the loss is not finite, or there are no refusals.
    """
    chosen = require_pool(step, "refuse").next_rows(rows)
    with torch.enable_grad(), step.forward:
        loss = step.reader.losses(chosen).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise GuardError("the anchor loss is not finite", seen=value, fix="lower the learning rate")
    return AnchorGradient(value, gradients_of(loss, step.parameters))


def decision_log_probabilities(reader: AnchorReader, rows: Sequence[TokenisedAnchor]) -> Tensor:
    """Log-probabilities at every supervised position, rows in order; tokens x vocabulary, float32 at least."""
    batch = reader.batch(rows)
    logits = at_least_float32(prefix.read(reader.model, batch.tokens, logits_to_keep=batch.labels.shape[1]).logits)
    found: Tensor = logits[batch.labels != -100].log_softmax(-1)
    return found


def clipped(gradients: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Scale down to a Euclidean norm of at most ``largest`` over all blocks (as ``clip_grad_norm_``)."""
    norm = math.sqrt(squared_norm(gradients))
    scale = min(1.0, largest / (norm + 1e-6))
    return {name: gradient * scale for name, gradient in gradients.items()}
