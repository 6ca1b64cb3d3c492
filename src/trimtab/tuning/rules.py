"""Update rules: what a guard does to one optimizer step.

Covered: ``spf`` (Algorithm 1 of arXiv 2601.10141), ``keel`` (ours, closed loop, two-sided), ``mixing`` (control).
Not covered: when a rule runs (``guard.py``) and the algebra that it uses (``gradients/surgery.py``).

A rule sees the task gradients after accumulation, reduction, unscaling and clipping, at the parameters that the
optimizer is about to update.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError, UsageError
from trimtab.gradients.factors import safety_gradient
from trimtab.gradients.surgery import polyak_step, spf_algorithm1
from trimtab.tuning.pools import AnchorPool


@dataclass
class Step:
    """What a rule may look at and change in one optimizer step.

    Attributes:
        model: the innermost module (no DDP wrapper), dropout inactive.
        parameters: trainable parameters by name.
        pools: the anchors, by side.
        forward: enters the precision of training (autocast) around an anchor pass.
        index: optimizer steps before this one.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    pools: dict[Side, AnchorPool]
    forward: AbstractContextManager[object]
    device: torch.device
    index: int

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Task gradients of the parameters that have one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


@dataclass(frozen=True)
class Report:
    """What happened in one step; logged, counted, never used for control.

    Attributes:
        anchor_loss: nats, by side, of the anchors looked at in this step.
        excess: the same above their references, by side; 0 where the aligned model's value holds.
        conflict: ``<g_task, g_anchor>``, or None where no anchor gradient was taken.
        cosine: its cosine.
        removed: share of the task gradient's norm that was removed.
        acted: the sides on which the step was changed.
        shift: Euclidean norm of the correction added to the parameters.
    """

    anchor_loss: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    conflict: float | None = None
    cosine: float | None = None
    removed: float = 0.0
    acted: tuple[str, ...] = ()
    shift: float = 0.0


class Rule(Protocol):
    """An update rule. ``decision_tokens``: supervised tokens per anchor; None means the whole reply and its end."""

    name: str
    decision_tokens: int | None

    def default_anchors(self) -> SafetyAnchors:
        """The anchors used where the user names none."""
        ...

    def step(self, step: Step) -> Report:
        """Change ``p.grad`` or ``p`` in place and say what was done."""
        ...

    def finish(self, step: Step) -> list[Report]:
        """After the last update: nothing, or corrections that the last update made necessary."""
        ...


@dataclass
class SpfRule:
    """SPF Algorithm 1 as published: one anchor, global conflict test, top-k left projection, nothing added."""

    rank: int = 20
    refresh_every: int = 1
    rows: int = 8
    name: str = "spf"
    decision_tokens: int | None = None

    def __post_init__(self) -> None:
        self._cached: object = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.published()

    def step(self, step: Step) -> Report:
        pool = require_pool(step, "refuse")
        if self._cached is None or step.index % self.refresh_every == 0:
            batch = pool.batch(pool.next_indices(self.rows), step.device)
            with step.forward:
                self._cached = safety_gradient(step.model, lambda: batch.losses(step.model).mean())
        safety = self._cached
        task = step.gradients
        result = spf_algorithm1(task, safety, self.rank)  # type: ignore[arg-type]
        for name, gradient in result.gradients.items():
            task[name].copy_(gradient)
        return Report(
            anchor_loss={"refuse": safety.loss},  # type: ignore[attr-defined]
            conflict=result.conflict,
            cosine=result.cosine,
            removed=result.removed,
            acted=("refuse",) if result.projected else (),
        )

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002 - a projection never pulls back
        return []


@dataclass
class MixingRule:
    """Control: ``g <- g_task + weight * g_anchor`` at every step, anchors in rotation."""

    weight: float = 1.0
    rows: int = 8
    name: str = "mixing"
    decision_tokens: int | None = None

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:
        losses: dict[str, float] = {}
        for side, pool in step.pools.items():
            batch = pool.batch(pool.next_indices(self.rows), step.device)
            with torch.enable_grad(), step.forward:
                loss = batch.losses(step.model).mean()
            for name, gradient in gradients_of(loss, step.parameters).items():
                add_gradient(step.parameters[name], gradient, self.weight)
            losses[side] = float(loss.detach())
        return Report(anchor_loss=losses, acted=tuple(losses))

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


@dataclass
class KeelRule:
    """Closed loop on both sides, on the tokens where the decision falls.

    Each step looks at a few anchors of each side in rotation. The sensor of a side is how far its anchors have drifted
    above their own losses in the aligned model, ``h = mean_i max(0, l_i - ref_i)``. While ``h <= margin`` nothing
    is done. Otherwise the task gradient loses its component against ``grad h``, if it has one, and the parameters take
    one Polyak step on ``h``: the shortest step that brings the linearised drift back to zero.

    Attributes:
        rows: anchors a side and step.
        margin: drift that is tolerated (nats per decision token).
        decision_tokens: first tokens of the reply that are watched.
        relaxation: share of the Polyak step that is taken.
        settle_rounds: most corrections a side after the last update.
    """

    rows: int = 4
    margin: float = 0.05
    decision_tokens: int | None = 3
    relaxation: float = 1.0
    largest_shift: float = 0.5
    settle_rounds: int = 12
    mode: str = "polyak"
    weight: float = 1.0
    name: str = "keel"

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:
        reports = [self._hold(step, side, pool, self.rows) for side, pool in step.pools.items()]
        return merge(reports)

    def finish(self, step: Step) -> list[Report]:
        reports = []
        for _ in range(self.settle_rounds):
            report = merge([self._hold(step, side, pool, 4 * self.rows) for side, pool in step.pools.items()])
            reports.append(report)
            if not report.acted:
                break
        return reports

    def _hold(self, step: Step, side: Side, pool: AnchorPool, rows: int) -> Report:
        if pool.reference is None:
            raise GuardError("the anchors have no reference losses", fix="let the guard prepare before training")
        indices = pool.next_indices(rows)
        batch = pool.batch(indices, step.device)
        reference = pool.reference[indices].to(step.device)
        with torch.enable_grad(), step.forward:
            losses = batch.losses(step.model)
            drift = (losses - reference).clamp_min(0).mean()
        loss, excess = float(losses.detach().mean()), float(drift.detach())
        report = Report(anchor_loss={side: loss}, excess={side: excess})
        if not excess > self.margin:
            if excess != excess:  # NaN
                raise GuardError("the anchor loss is not finite", seen=loss, fix="lower the learning rate")
            return report
        return self._correct(step, side, gradients_of(drift, step.parameters), report)

    def _correct(self, step: Step, side: Side, anchor: dict[str, Tensor], report: Report) -> Report:
        task = step.gradients
        shared = [name for name in anchor if name in task]
        inner = sum(float((task[name].double() * anchor[name].double()).sum()) for name in shared)
        squared = sum(float(gradient.double().square().sum()) for gradient in anchor.values())
        norm = sum(float(gradient.double().square().sum()) for gradient in task.values()) ** 0.5
        removed = 0.0
        if inner < 0:
            for name in shared:
                task[name].sub_(anchor[name].to(task[name].dtype), alpha=inner / squared)
            removed = -inner / max(squared**0.5 * norm, 1e-30)
        excess = report.excess[side]
        if self.mode == "polyak":
            length = self.relaxation * polyak_step(excess, 0.0, squared)
            length = min(length, self.largest_shift / squared**0.5)
            with torch.no_grad():
                for name, gradient in anchor.items():
                    step.parameters[name].sub_(gradient.to(step.parameters[name].dtype), alpha=length)
        else:
            length = 0.0
            for name, gradient in anchor.items():
                add_gradient(step.parameters[name], gradient, self.weight)
        return Report(
            anchor_loss=report.anchor_loss,
            excess=report.excess,
            conflict=inner,
            cosine=inner / max(squared**0.5 * norm, 1e-30),
            removed=removed,
            acted=(side,),
            shift=length * squared**0.5,
        )


def gradients_of(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Dense gradients of the parameters that ``loss`` reaches; ``.grad`` stays as it is."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def add_gradient(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    """``p.grad += weight * gradient``, also where the task left no gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=weight)


def merge(reports: list[Report]) -> Report:
    """One report of both sides; conflict and cosine are those of the first side that acted."""
    acting = [report for report in reports if report.acted]
    return Report(
        anchor_loss={side: loss for report in reports for side, loss in report.anchor_loss.items()},
        excess={side: value for report in reports for side, value in report.excess.items()},
        conflict=acting[0].conflict if acting else None,
        cosine=acting[0].cosine if acting else None,
        removed=max((report.removed for report in reports), default=0.0),
        acted=tuple(side for report in acting for side in report.acted),
        shift=sum(report.shift**2 for report in reports) ** 0.5,
    )


def require_pool(step: Step, side: Side) -> AnchorPool:
    """The pool of one side, or an error where the anchors have none."""
    if side not in step.pools:
        raise GuardError(f"this rule needs anchors to {side}", seen=list(step.pools), fix="add some to the anchor file")
    return step.pools[side]


def make_rule(name: str, **options: Any) -> Rule:
    """A rule by name with its options.

    Raises:
        UsageError: for an unknown name or option.
    """
    rules: dict[str, Any] = {"spf": SpfRule, "keel": KeelRule, "mixing": MixingRule}
    if name not in rules:
        raise UsageError("unknown guard rule", seen=name, fix=f"use one of: {', '.join(rules)}")
    known = set(rules[name].__dataclass_fields__) - {"name"}
    if unknown := set(options) - known:
        raise UsageError(f"unknown option for the rule {name}", seen=sorted(unknown), fix=f"known: {sorted(known)}")
    rule: Rule = rules[name](**options)
    return rule
