"""Update rules: what a guard does to one optimizer step.

Covered: what a rule is given and gives back, ``spf`` (Algorithm 1 of arXiv 2601.10141) and ``mixing`` (control).
Not covered: ``keel`` and the rivals (files of their own), a rule by its name (``rule_names.py``), when a rule runs
(``guard.py``) and the algebra that it uses (``gradients/surgery.py``).

A rule sees the task gradients after accumulation, reduction, unscaling and clipping, at the parameters that the
optimizer is about to update.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError, UsageError
from trimtab.gradients.factors import SafetyGradient
from trimtab.gradients.sharding import is_sharded, scalar
from trimtab.gradients.surgery import spf_algorithm1
from trimtab.tuning.distributed import gradients_by_backward, spf_on_shards
from trimtab.tuning.half import dense_gradients, factored_gradient
from trimtab.tuning.pools import AnchorPool, AnchorReader
from trimtab.tuning.state import pack_gradient, unpack_gradient


@dataclass
class Step:
    """What a rule may look at and change in one optimizer step.

    Attributes:
        reader: gives the anchors' losses on the model (no DDP wrapper, dropout inactive).
        parameters: trainable parameters by name.
        pools: the anchors, by side.
        forward: enters the precision of training (autocast) around an anchor pass.
        index: optimizer steps before this one.
        optimizer: the torch optimizer that steps; for rules that take a step of their own.
        total: optimizer steps of the whole run, where somebody knows.
    """

    reader: AnchorReader
    parameters: dict[str, nn.Parameter]
    pools: dict[Side, AnchorPool]
    forward: AbstractContextManager[object]
    index: int
    optimizer: Any = None
    total: int | None = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Task gradients of the parameters that have one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @property
    def whole(self) -> bool:
        """Whether a module's own parameters are what is trained: neither shards nor an engine's partitions."""
        return not any(is_sharded(parameter) for parameter in self.parameters.values())

    @property
    def values(self) -> Mapping[str, Tensor]:
        """What a rule changes to move the parameters; ``moved`` follows every change."""
        return self.parameters

    def moved(self) -> None:
        """Nothing: the values are the parameters (``zero.py`` has others)."""


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
    """An update rule. ``decision_tokens``: supervised tokens per anchor; None means the whole reply and its end.

    A rule may also have ``prepare(reader, pools)``, called once on the aligned model; ``after(step, report)``, called
    when the optimizer has stepped, which returns the step's final report; ``tensors()`` and ``load_tensors(tensors)``,
    what a resumed run needs beside the anchors.
    """

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
        for option in ("rank", "refresh_every", "rows"):
            if getattr(self, option) < 1:
                raise UsageError(f"spf's {option} is at least 1", seen=getattr(self, option), fix="raise it")
        self._cached: SafetyGradient | None = None
        self._resumed: Mapping[str, Tensor] = {}  # its parts, until a step says which device each belongs on

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.published()

    def tensors(self) -> dict[str, Tensor]:
        """The anchors' gradient, where a later step uses it again: the parameters that it was taken at are gone."""
        if self._cached is None or self.refresh_every == 1:
            return dict(self._resumed)
        return pack_gradient(self._cached)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._cached, self._resumed = None, tensors

    def step(self, step: Step) -> Report:
        pool = require_pool(step, "refuse")
        if any(is_sharded(parameter) for parameter in step.parameters.values()):
            return self._step_sharded(step, pool)
        safety, task = self._safety(step, pool), step.gradients
        result = spf_algorithm1(task, safety, self.rank, in_place=True)
        return Report(
            anchor_loss={"refuse": safety.loss},
            conflict=result.conflict,
            cosine=result.cosine,
            removed=result.removed,
            acted=("refuse",) if result.projected else (),
        )

    def _safety(self, step: Step, pool: AnchorPool) -> SafetyGradient:
        """The anchors' gradient, of this step or of the last refresh."""
        if step.index % self.refresh_every == 0:
            rows = pool.next_rows(self.rows)
            with step.forward:
                self._cached = factored_gradient(step.reader.model, lambda: step.reader.losses(rows).mean())
        elif self._cached is None and self._resumed:
            self._cached = unpack_gradient(self._resumed, step.parameters)
        if self._cached is None:
            fix = "resume from a checkpoint of this version, or start a new run"
            raise GuardError("the guard state holds no cached anchor gradient", seen=f"step {step.index}", fix=fix)
        return self._cached

    def _step_sharded(self, step: Step, pool: AnchorPool) -> Report:
        """FSDP2: the anchors' gradient arrives as shards; one block at a time is gathered, projected, cut again."""
        with torch.enable_grad(), step.forward:
            loss = step.reader.losses(pool.next_rows(self.rows)).mean()
        done = spf_on_shards(step.gradients, gradients_of(loss, step.parameters), self.rank)
        return Report(
            anchor_loss={"refuse": scalar(loss.detach())},
            conflict=done.conflict,
            cosine=done.cosine,
            removed=done.removed,
            acted=("refuse",) if done.projected else (),
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
            with torch.enable_grad(), step.forward:
                loss = step.reader.losses(pool.next_rows(self.rows)).mean()
            for name, gradient in gradients_of(loss, step.parameters).items():
                add_gradient(step.parameters[name], gradient, self.weight)
            losses[side] = float(loss.detach())
        return Report(anchor_loss=losses, acted=tuple(losses))

    def finish(self, step: Step) -> list[Report]:  # noqa: ARG002
        return []


def gradients_of(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Dense gradients of the parameters that ``loss`` reaches; ``.grad`` stays as it is."""
    if any(is_sharded(parameter) for parameter in parameters.values()):
        return gradients_by_backward(loss, parameters)
    return dense_gradients(loss, parameters)


def add_gradient(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    """``p.grad += weight * gradient``, also where the task left no gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=weight)


def require_pool(step: Step, side: Side) -> AnchorPool:
    """The pool of one side, or an error where the anchors have none."""
    if side not in step.pools:
        raise GuardError(f"this rule needs anchors to {side}", seen=list(step.pools), fix="add some to the anchor file")
    return step.pools[side]
