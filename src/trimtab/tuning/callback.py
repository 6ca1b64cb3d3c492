"""The guard as a callback of Transformers' and TRL's trainers.

Covered: installation on the trainer's innermost optimizer, a log line per step, the anchors as they were used, state in
every checkpoint, resume, the check that the guard saw every optimizer step. Not covered: the rules themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.anchors import SafetyAnchors
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard, innermost
from trimtab.tuning.rules import Report, Rule
from trimtab.tuning.state import load_state, require_same_requests, save_state

LOG_NAME = "guard.jsonl"
ANCHORS_NAME = "guard_anchors.jsonl"  # with the aligned model's replies, for the next run's --guard_anchors


class SafetyGuardCallback(TrainerCallback):
    """Guard a Trainer.

    Example::

        trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[SafetyGuardCallback(rule="keel")])
        # as published:
        SafetyGuardCallback(SafetyAnchors.published(), rule="spf", rank=20)

    Args:
        anchors: None takes the rule's own default.
        rule: "keel", "spf", "mixing" or a ``Rule``.
        name: what to call the model in messages.
        clip_after: the trainer's ``max_grad_norm`` limits the gradient after the rule has changed it and not before,
            as SPF Algorithm 1 states it.
        **options: options of the rule.

    Raises:
        UsageError: when training begins: an unknown rule or option.
        GuardError: when training begins: no tokenizer, a checkpoint without the guard's state or of another rule or
            other anchors, and what ``SafetyGuard.install`` refuses. In a step: what the rule refuses. When training
            ends: the guard was never installed, or saw another number of steps than the trainer counted.
    """

    def __init__(
        self,
        anchors: SafetyAnchors | None = None,
        rule: str | Rule = "keel",
        *,
        name: str = "the model",
        clip_after: bool = False,
        **options: Any,
    ) -> None:
        self.anchors, self.rule, self.options, self.name, self.clip_after = anchors, rule, options, name, clip_after
        self.guard: SafetyGuard | None = None
        self._handle: Any = None
        self._log: IO[str] | None = None
        self._first_step = 0
        self._skipped = 0  # of the guard's count, written so far
        self._max_norm: float | None = None  # the trainer's, while the guard clips in its place

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None:
            raise GuardError("the trainer has no tokenizer", fix="pass processing_class=tokenizer to the trainer")
        loaded = LoadedModel(model=innermost(model), tokenizer=tokenizer, name=self.name)  # type: ignore[arg-type]
        if self.clip_after and args.max_grad_norm:
            self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        self.guard = SafetyGuard(
            loaded, self.anchors, self.rule, autocast=autocast_of(args), clip_norm=self._max_norm, **self.options
        )
        self.guard.total_steps = state.max_steps or None
        self._first_step = state.global_step
        if state.global_step > 0:
            kept = load_state(checkpoint_folder(args, state))
            if self.anchors is not None:
                require_same_requests(self.anchors, kept["anchors"])
            self.guard.load_state_dict(kept)
        self._skipped = self.guard.counters.skipped
        self._handle = self.guard.install(optimizer)
        if args.output_dir and state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if self.guard.anchors.system is None:  # a file has no place for it, and these replies belong to it
                self.guard.anchors.to_jsonl(folder / ANCHORS_NAME)
            self._log = (folder / LOG_NAME).open("a" if state.global_step else "w", encoding="utf-8")
            self._write(-1, {"event": "start", "rule": repr(self.guard.rule), "anchors": self.guard.anchors.origin})

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a fused optimizer is called in a skipped step too: the guard itself has counted that one
        if self.guard is not None and getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.guard.counters.skipped += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard is None:
            return
        if self.guard.counters.skipped > self._skipped:
            self._skipped = self.guard.counters.skipped
            self._write(state.global_step, {"event": "skipped"})
        elif self.guard.history:
            self._write(state.global_step, flat(self.guard.history[-1]))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard is None or not self.guard.history:
            return
        values = {f"guard/{key}": value for key, value in flat(self.guard.history[-1]).items()}
        values["guard/acted_steps"] = self.guard.counters.acted
        logs: dict[str, Any] = kwargs.get("logs") or {}
        logs.update(values)
        if state.log_history:
            row: dict[str, Any] = state.log_history[-1]
            row.update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if self.guard is None:
            return
        held = self.guard.state_dict()  # on every process: what is sharded is gathered
        if state.is_world_process_zero and folder.is_dir():
            save_state(folder, held)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is None:
            raise GuardError("training ended and the guard was never installed", fix="pass the callback to the trainer")
        if self._max_norm is not None:
            args.max_grad_norm = self._max_norm
        self._handle.remove()
        before = len(self.guard.history)
        self.guard.finish()
        for report in self.guard.history[before:]:
            self._write(state.global_step, {"event": "settle", **flat(report)})
        if self._log is not None:
            self._log.close()
        counters = self.guard.counters
        if counters.steps + counters.skipped != state.global_step:
            raise GuardError(
                "the guard did not see every optimizer step",
                seen=f"{counters.steps} calls, {counters.skipped} skipped for overflow, {state.global_step} steps",
                fix="use an optimizer that steps exactly once per update",
            )

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(json.dumps({"step": step, **values}) + "\n")
            self._log.flush()


def flat(report: Report) -> dict[str, float | str | None]:
    """A report as one flat row for a log."""
    row: dict[str, float | str | None] = {}
    for side, loss in report.anchor_loss.items():
        row[f"anchor_loss/{side}"] = round(loss, 6)
    for side, value in report.excess.items():
        row[f"excess/{side}"] = round(value, 6)
    row.update(conflict=report.conflict, cosine=report.cosine, removed=report.removed, shift=report.shift)
    row["acted"] = "+".join(report.acted)
    return row


def autocast_of(args: TrainingArguments) -> torch.dtype | None:
    """The dtype in which the trainer's forward passes run."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the checkpoint that is being resumed lies."""
    named = args.resume_from_checkpoint
    if isinstance(named, str) and (Path(named) / "trainer_state.json").is_file():
        return Path(named)
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
