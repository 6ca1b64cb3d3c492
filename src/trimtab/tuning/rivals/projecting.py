"""Rules that edit the task gradient along one direction: per-tensor, A-GEM, PCGrad, SafeGrad.

Covered: which anchors, which gradient, writing the result into ``p.grad``. Not covered: the algebra
(``gradients/one_direction.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError
from trimtab.gradients.one_direction import RELEASED_THRESHOLD, Edited, agem, pcgrad, per_tensor, safegrad
from trimtab.tuning.pools import AnchorPool, AnchorReader
from trimtab.tuning.rivals.common import AnchorGradient, anchor_gradient, decision_log_probabilities
from trimtab.tuning.rules import Report, Step, gradients_of, require_pool


@dataclass
class PerTensorRule:
    """The trainer that the SPF authors released, as it runs in one process (with ZeRO it becomes ``alternating``).

    ``threshold`` switches a tensor's protection off where the squared norm of its anchor gradient is below it: in the
    release, and so here, that happens silently once the anchor is memorised; ``Report.cosine`` is None here and
    ``disabled`` counts such tensors over the run. Acts once per update (the release: once per micro-batch).
    """

    rows: int = 1
    threshold: float = RELEASED_THRESHOLD
    name: str = "per-tensor"
    decision_tokens: int | None = None

    def __post_init__(self) -> None:
        self.disabled = 0

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.published()

    def tensors(self) -> dict[str, Tensor]:
        """The count, for a resumed run."""
        return {"disabled": torch.tensor(self.disabled)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.disabled = int(tensors.get("disabled", 0))  # older checkpoints did not count on

    def step(self, step: Step) -> Report:
        anchor = anchor_gradient(step, self.rows)
        edited = per_tensor(step.gradients, anchor.gradients, self.threshold)
        self.disabled += edited.disabled
        return write(step, edited, anchor, acted=edited.projected > 0)

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002 - a projection never pulls back
        return []


@dataclass
class AGemRule:
    """A-GEM (arXiv 1812.00420) with the refusals as its memory: one global test, one direction, nothing added."""

    rows: int = 8
    name: str = "a-gem"
    decision_tokens: int | None = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:
        anchor = anchor_gradient(step, self.rows)
        edited = agem(step.gradients, anchor.gradients)
        return write(step, edited, anchor, acted=edited.projected > 0)

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


@dataclass
class PcgradRule:
    """PCGrad (arXiv 2001.06782) with two tasks: the user's and the refusals; both deconflicted, then added."""

    rows: int = 8
    name: str = "pcgrad"
    decision_tokens: int | None = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:
        anchor = anchor_gradient(step, self.rows)
        return write(step, pcgrad(step.gradients, anchor.gradients), anchor, acted=True)

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


@dataclass
class SafeGradRule:
    """SafeGrad (arXiv 2508.07172): project off ``g_a = grad KL(aligned || model)``, then add ``rho g_a``.

    The aligned model's distributions over the anchors' replies are kept: anchors x tokens x vocabulary float32 values
    (20 anchors of 13 tokens at 49,152: 51 MB). At the first step the divergence and its gradient are zero.
    """

    rho: float = 1.0
    rows: int = 8
    name: str = "safegrad"
    decision_tokens: int | None = None

    def __post_init__(self) -> None:
        self._aligned: list[Tensor] = []

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled(20)

    def prepare(self, reader: AnchorReader, pools: dict[Side, AnchorPool]) -> None:
        """Keep the aligned model's log-probabilities at every supervised position of the refusals."""
        if "refuse" not in pools:
            raise GuardError("SafeGrad needs anchors to refuse", seen=list(pools), fix="add some to the anchor file")
        with torch.no_grad():
            self._aligned = [decision_log_probabilities(reader, [row]).cpu() for row in pools["refuse"].rows]

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"aligned.{index}": value for index, value in enumerate(self._aligned)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._aligned = [tensors[f"aligned.{index}"] for index in range(len(tensors))]

    def step(self, step: Step) -> Report:
        pool = require_pool(step, "refuse")
        indices = pool.next_indices(self.rows)
        with torch.enable_grad(), step.forward:
            divergence = self.divergence(step.reader, pool, indices)
        gradients = gradients_of(divergence, step.parameters)
        anchor = AnchorGradient(float(divergence.detach()), gradients)
        if not any(bool(gradient.any()) for gradient in gradients.values()):
            return Report(anchor_loss={"refuse": anchor.loss})  # still the aligned model: nothing to hold yet
        return write(step, safegrad(step.gradients, gradients, self.rho), anchor, acted=True)

    def divergence(self, reader: AnchorReader, pool: AnchorPool, indices: list[int]) -> Tensor:
        """Mean over the supervised tokens of KL(aligned || model), nats; differentiable."""
        mine = decision_log_probabilities(reader, [pool.rows[index] for index in indices])  # tokens x vocabulary
        aligned = torch.cat([self._aligned[index] for index in indices]).to(mine.device)
        return F.kl_div(mine, aligned, log_target=True, reduction="batchmean")

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


def write(step: Step, edited: Edited, anchor: AnchorGradient, *, acted: bool) -> Report:
    """Put edited blocks into ``p.grad`` and say what happened."""
    for name, gradient in edited.gradients.items():
        parameter = step.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient)
    return Report(
        anchor_loss={"refuse": anchor.loss},
        conflict=edited.conflict,
        removed=edited.removed,
        acted=("refuse",) if acted else (),
    )
