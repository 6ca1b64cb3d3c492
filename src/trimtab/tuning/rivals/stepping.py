"""Rules that take steps of their own: alternating steps, SPARD-like scaling, Lisa.

Covered: each as its source states, where the source is clear; what is unclear is said in the class. Not covered: the
data selection of SPARD (its subset is chosen by a determinantal point process; here the anchors rotate).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.anchors import SafetyAnchors
from trimtab.errors import GuardError
from trimtab.gradients.sharding import scalar
from trimtab.tuning.rivals.common import anchor_gradient, clipped
from trimtab.tuning.rules import Report, Step

State = Literal["align", "task"]


@dataclass
class AlternatingRule:
    """What the released SPF launcher does in effect under DeepSpeed ZeRO (reconstruction from its code and log).

    One optimizer step on the clipped task gradient, then one on the clipped anchor gradient; same moments, same
    learning rate. The anchor is trained on and memorised. Not a projection, whatever its launcher is called.
    """

    rows: int = 1
    largest_norm: float = 1.0
    name: str = "alternating"
    decision_tokens: int | None = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.published()

    def step(self, step: Step) -> Report:  # noqa: ARG002 - the task step stays as it is
        return Report()

    def after(self, step: Step, report: Report) -> Report:
        """The second optimizer step, on the anchors alone, at the parameters that the task step left."""
        anchor = anchor_gradient(step, self.rows)
        gradients = clipped(anchor.gradients, self.largest_norm)
        for name, parameter in step.parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype) if name in gradients else None
        step.optimizer.step()
        for parameter in step.parameters.values():
            parameter.grad = None
        return replace(report, anchor_loss={"refuse": anchor.loss}, acted=("refuse",))

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


@dataclass
class SpardRule:
    """SPARD's correction (ICML 2026): after a utility step, if ``L_safe > tau + delta``, one step on a safe batch.

    Each parameter tensor moves by ``-alpha g`` with ``alpha = min((L_safe - tau) / (||g|| + 1e-8), alpha_max)``.
    ``tau`` 0.2 and ``delta`` 0.1 as in its README. ``alpha_max``: 1 in the README's example, the fine-tuning learning
    rate in its table of defaults; 1 here (None takes the optimizer's learning rate).
    """

    tau: float = 0.2
    delta: float = 0.1
    alpha_max: float | None = 1.0
    rows: int = 8
    name: str = "spard"
    decision_tokens: int | None = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:  # noqa: ARG002
        return Report()

    def after(self, step: Step, report: Report) -> Report:
        """The correction at the parameters that the utility step left."""
        anchor = anchor_gradient(step, self.rows)
        if anchor.loss <= self.tau + self.delta:
            return replace(report, anchor_loss={"refuse": anchor.loss})
        largest = self.alpha_max if self.alpha_max is not None else float(step.optimizer.param_groups[0]["lr"])
        squared = 0.0
        with torch.no_grad():
            for name, gradient in anchor.gradients.items():
                norm = scalar(gradient.double().square().sum()) ** 0.5
                alpha = min((anchor.loss - self.tau) / (norm + 1e-8), largest)
                step.parameters[name].sub_(gradient.to(step.parameters[name].dtype), alpha=alpha)
                squared += (alpha * norm) ** 2
        return replace(report, anchor_loss={"refuse": anchor.loss}, acted=("refuse",), shift=squared**0.5)

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


@dataclass
class LisaRule:
    """Lisa (arXiv 2405.18641): alternate states of alignment and fine-tuning, held together by a proximal term.

    ``align_steps`` steps on the anchors, then ``task_steps`` on the task; in each state the loss has
    ``rho/2 ||w - w'||^2`` with ``w'`` the weights where the other state ended; the term is off for the first
    ``free_share`` of all steps (of ``free_steps`` where the total is unknown). The source: 100 and 900 steps, rho 1,
    10,000 alignment rows. Inside a trainer the task batch of an alignment step is read and not used.
    """

    align_steps: int = 100
    task_steps: int = 900
    rho: float = 1.0
    free_share: float = 0.1
    free_steps: int = 0
    rows: int = 8
    largest_norm: float = 1.0
    name: str = "lisa"
    decision_tokens: int | None = None

    def __post_init__(self) -> None:
        self._ends: dict[str, dict[str, Tensor]] = {}  # where each state ended last, on the CPU

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def state_at(self, index: int) -> State:
        """The state of one optimizer step; alignment comes first."""
        return "align" if index % (self.align_steps + self.task_steps) < self.align_steps else "task"

    def tensors(self) -> dict[str, Tensor]:
        return {f"{state}.{name}": value for state, found in self._ends.items() for name, value in found.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._ends = {}
        for key, value in tensors.items():
            state, _, name = key.partition(".")
            self._ends.setdefault(state, {})[name] = value

    def step(self, step: Step) -> Report:
        if step.total is not None and step.total <= self.align_steps:
            fix = "lower --guard_align_steps (the source: one step in ten), or train longer"
            raise GuardError(
                "every step of this run would be one of alignment: the task is never trained",
                seen=f"{step.total} steps, {self.align_steps} of alignment first",
                fix=fix,
            )
        state = self.state_at(step.index)
        if step.index and (before := self.state_at(step.index - 1)) != state:
            self._ends[before] = {name: p.detach().cpu().clone() for name, p in step.parameters.items()}
        loss: dict[str, float] = {}
        gradients = step.gradients
        if state == "align":
            anchor = anchor_gradient(step, self.rows)
            loss, gradients = {"refuse": anchor.loss}, anchor.gradients
        pulled = self._with_proximal_term(step, state, gradients)
        for name, parameter in step.parameters.items():
            parameter.grad = pulled[name].to(parameter.dtype) if name in pulled else None
        return Report(anchor_loss=loss, acted=("refuse",) if state == "align" else ())

    def _with_proximal_term(self, step: Step, state: State, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        other = self._ends.get("task" if state == "align" else "align")
        free = int(self.free_share * step.total) if step.total else self.free_steps
        if other is None or step.index < free:
            return clipped(gradients, self.largest_norm) if state == "align" else gradients
        pulled = {
            name: gradient + self.rho * (step.parameters[name].detach() - other[name].to(gradient.device)).to(gradient)
            for name, gradient in gradients.items()
        }
        return clipped(pulled, self.largest_norm)

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []
