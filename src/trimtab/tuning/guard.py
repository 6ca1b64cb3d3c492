"""The guard: one hook on the optimizer, which lets a rule act once per real update.

Covered: attaching to any torch optimizer (raw loops, Accelerate, Trainer), DDP, mixed precision, counters, state.
Not covered: what is done to the step (``rules.py``), sharded tensors (``distributed.py``), DeepSpeed's partitions
(``zero.py``), FSDP 1 (refused before the first step, saying why).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning.distill import distill, model_of
from trimtab.tuning.distributed import Fresh, gather_once, gathered, placed, require_shardable, reshard
from trimtab.tuning.half import computes_in_half, half_precision, unscale, will_skip
from trimtab.tuning.pools import AnchorPool, build_pools, reader_for
from trimtab.tuning.rule_names import make_rule
from trimtab.tuning.rules import Report, Rule, Step
from trimtab.tuning.zero import ZeroHandle, ZeroStep, require_zero, zero_optimizer


@dataclass
class Counters:
    """Totals over a run; ``steps`` and ``skipped``, by a gradient scaler, must make up the optimizer's own count."""

    steps: int = 0
    acted: int = 0
    conflicts: int = 0
    skipped: int = 0


class SafetyGuard:
    """Keeps a model at its anchors while an optimizer trains it.

    Example::

        loaded = trimtab.load("demo")
        guard = SafetyGuard(loaded, rule="keel")
        with guard.attach(optimizer):
            ...  # any training loop

    Args:
        loaded: the aligned model with its tokenizer, before training.
        anchors: None takes the rule's own default. Missing replies are written by the model itself.
        rule: "keel", "spf", "mixing", a rival's name (``rivals.catalogue.STEP_RULES``) or a ``Rule``.
        autocast: dtype of the training's autocast, or None.
        model: the module that is trained, where it is not ``loaded.model`` (a PEFT or DDP wrapper around it).
        clip_norm: clip the gradient that the rule leaves to this norm; the training loop must then not clip before.
        **options: options of a rule given by name, e.g. ``rank=20``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        anchors: SafetyAnchors | None = None,
        rule: str | Rule = "keel",
        *,
        autocast: torch.dtype | None = None,
        model: nn.Module | None = None,
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        self.loaded = loaded
        self.rule = make_rule(rule, **options) if isinstance(rule, str) else rule
        self.anchors = anchors if anchors is not None else self.rule.default_anchors()
        self.autocast, self.clip_norm = autocast, clip_norm
        self.model = innermost(model if model is not None else loaded.model)
        self.reader = reader_for(loaded, self.model)
        self.pools: dict[Side, AnchorPool] = {}
        self.history: list[Report] = []
        self.counters = Counters()
        self.total_steps: int | None = None  # of the whole run; a trainer's callback knows it
        self._half = computes_in_half(self.model, autocast)
        self._partitioned = False  # by DeepSpeed
        self._inside = False  # a rule that steps the optimizer itself must not be asked about its own step

    def prepare(self) -> None:
        """Write missing replies and measure the references; call it while the model is still the aligned one."""
        if self.pools:
            return
        with quiet(self.model), torch.random.fork_rng():
            gather_once(self.model)
            self.anchors = distill(model_of(self.loaded, self.model), self.anchors)
            self.pools = build_pools(self.loaded, self.anchors, self.rule.decision_tokens)
            with self._forward():
                for pool in self.pools.values():
                    pool.reference = self.reader.measure(pool.rows)
                if hasattr(self.rule, "prepare"):
                    self.rule.prepare(self.reader, self.pools)
        reshard(self.model)

    @contextmanager
    def attach(self, optimizer: Any) -> Iterator[SafetyGuard]:
        """Install the guard for the duration of a ``with`` block; on a clean exit the last update is settled."""
        handle = self.install(optimizer)
        try:
            yield self
        finally:
            handle.remove()
        self.finish()

    def install(self, optimizer: Any) -> Any:
        """Install the hook and return its handle; ``finish`` is then the caller's to call.

        Raises:
            GuardError: for optimizers and wrappers under which the guard would silently do nothing.
        """
        if zero := zero_optimizer(optimizer):
            if self.clip_norm is not None:
                fix = "leave clip_after (clip_norm) out: max_grad_norm is what you ask for there"
                raise GuardError("DeepSpeed's engine clips after the guard by itself", seen=self.clip_norm, fix=fix)
            require_zero(self.rule, {name: p for name, p in self.model.named_parameters() if p.requires_grad})
            self.prepare()
            self._partitioned = True
            return ZeroHandle(zero, self._on_zero_step)
        inner = innermost_optimizer(optimizer)
        trained = {id(p) for group in inner.param_groups for p in group["params"]}
        mine = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not trained & mine:
            raise GuardError(
                "the optimizer holds none of the guarded model's trainable parameters",
                fix="build the optimizer from the model that the guard was given, after wrapping it",
            )
        require_shardable(self.rule, dict(self.model.named_parameters()))
        self.prepare()
        handles = [inner.register_step_pre_hook(self._on_step)]
        if hasattr(self.rule, "after"):
            handles.append(inner.register_step_post_hook(self._after_step))
        return Handles(handles)

    def finish(self) -> None:
        """Settle the last update and check that the guard really ran.

        Raises:
            GuardError: when no optimizer step was ever seen.
        """
        if self.counters.steps == 0:
            seen, fix = f"{self.counters.skipped} skipped for overflow", "check the training loop"
            raise GuardError("training ended and the guard saw no optimizer step", seen=seen, fix=fix)
        with quiet(self.model), torch.random.fork_rng(), half_precision(self._half):
            step = self._zero_step(settling=True) if self._partitioned else self._step()
            if not self._partitioned:
                for parameter in step.parameters.values():
                    parameter.grad = None
            self.history.extend(self.rule.finish(step))
        reshard(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: anchors, references, rotation, counters (tensors on the CPU).

        Under FSDP2 every process calls it.
        """
        return {
            "rule": repr(self.rule),
            "anchors": self.anchors,
            "cursors": {side: pool.cursor for side, pool in self.pools.items()},
            "references": {side: pool.reference for side, pool in self.pools.items()},
            "likely": {side: pool.likely for side, pool in self.pools.items()},
            "counters": vars(self.counters).copy(),
            "tensors": gathered(self.rule.tensors()) if hasattr(self.rule, "tensors") else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a guarded run. The references stay those of the aligned model, not of the interrupted one.

        Raises:
            GuardError: when the state was written under another rule.
        """
        if state["rule"] != repr(self.rule):
            raise GuardError(
                "the checkpoint was guarded by another rule",
                seen=f"{state['rule']}, now {self.rule!r}",
                fix="resume with the same guard options, or start a new run",
            )
        self.anchors = state["anchors"]
        self.pools = build_pools(self.loaded, self.anchors, self.rule.decision_tokens)
        for side, pool in self.pools.items():
            pool.reference, pool.cursor = state["references"][side], state["cursors"][side]
            pool.likely = state["likely"][side]
        self.counters = Counters(**state["counters"])
        if hasattr(self.rule, "load_tensors"):
            self.rule.load_tensors(placed(state["tensors"], dict(self.model.named_parameters())))

    def _on_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._inside:
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is not None:
            raise GuardError(
                "optimizers that take a closure are not supported",
                seen=type(optimizer).__name__,
                fix="use another optimizer, AdamW for instance",
            )
        if will_skip(optimizer):
            self.counters.skipped += 1
            return
        unscale(optimizer, kwargs)
        with quiet(self.model), torch.random.fork_rng(), half_precision(self._half):
            report = self.rule.step(self._step(optimizer))
        reshard(self.model)
        if self.clip_norm is not None:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.clip_norm)
        self._record(report)

    def _on_zero_step(self) -> None:
        step = self._zero_step(settling=False)
        with quiet(self.model), torch.random.fork_rng():
            report = self.rule.step(step)
        step.close()
        self._record(report)

    def _record(self, report: Report) -> None:
        self.history.append(report)
        self.counters.steps += 1
        self.counters.acted += bool(report.acted)
        self.counters.conflicts += report.conflict is not None and report.conflict < 0

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - torch's signature
        if self._inside or will_skip(optimizer):
            return
        self._inside = True
        before = self.history[-1]
        try:
            with quiet(self.model), torch.random.fork_rng(), half_precision(self._half):
                after: Report = self.rule.after(self._step(optimizer), before)  # type: ignore[attr-defined]
        finally:
            self._inside = False
            reshard(self.model)
        self.history[-1] = after
        self.counters.acted += bool(after.acted) and not before.acted

    def _step(self, optimizer: Any = None) -> Step:
        reshard(self.model)  # under FSDP2 the optimizer's parameters are the shards
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return Step(
            self.reader, parameters, self.pools, self._forward(), self.counters.steps, optimizer, self.total_steps
        )

    def _zero_step(self, *, settling: bool) -> ZeroStep:
        made = self._step()
        return ZeroStep(**vars(made), settling=settling)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _forward(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return Fresh(self.model, nullcontext())
        return Fresh(self.model, torch.autocast(self._device().type, dtype=self.autocast))


class Handles:
    """Several hooks with one ``remove``."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def innermost(model: nn.Module) -> nn.Module:
    """Take off DDP and DeepSpeed's engine; refuse the wrappers under which parameters are not what they seem.

    FSDP2 modules stay as they are.

    Raises:
        GuardError: under FSDP 1.
    """
    kind = type(model).__name__
    if kind == "FullyShardedDataParallel":
        fix = "use FSDP2: `accelerate launch --use_fsdp --fsdp_version 2`, or fsdp_version: 2 in its configuration"
        raise GuardError("FSDP 1 flattens the parameters, so blocks are no matrices any more", seen=kind, fix=fix)
    wrapped = kind in ("DistributedDataParallel", "DeepSpeedEngine")
    return model.module if wrapped else model  # type: ignore[return-value]


def innermost_optimizer(optimizer: Any) -> Any:
    """Take off Accelerate's wrappers.

    Raises:
        GuardError: when what is inside is no torch optimizer or steps inside backward.
    """
    while hasattr(optimizer, "accelerator_state") or not isinstance(optimizer, torch.optim.Optimizer):
        if not hasattr(optimizer, "optimizer"):
            fix = "use a torch.optim optimizer, or DeepSpeed ZeRO"
            raise GuardError("the guard cannot hook this optimizer", seen=type(optimizer).__name__, fix=fix)
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    if any(word in name for word in ("LayerWiseDummy", "LOMO", "BAdam")):
        raise GuardError("optimizers that step inside backward cannot be guarded", seen=name, fix="use AdamW")
    return optimizer


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Anchor passes without dropout and without activation checkpointing; both are as before afterwards."""
    drops = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    rates = [m.p for m in drops]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for drop in drops:
            drop.p = 0.0
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for drop, rate in zip(drops, rates, strict=True):
            drop.p = rate
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
