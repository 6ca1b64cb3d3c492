"""Hardening by self-distillation: under the approximation, the model learns to say what it says without it.

In a step, with E the exact model as it was given, A the policy under one of the approximations (they take turns) and C
the policy exact, all on words that E wrote itself:

    loss = mean KL(E || A) over refusals + over answers
         + clean * (mean KL(E || C) over refusals + over answers + over ordinary texts)

The first line brings refusals and answers back under the approximation, from both sides at once; the second keeps the
exact model where it was. Divergences are over E's likeliest tokens and all others together (``tuning/likely.py``). No
reply is labelled good or bad, so nothing is gained by refusing everything. At the end the adapter is made smaller until
the exact model is within a bound of the given one (``shrink.py``).

Covered: any approximation or several, rounding too (``derivatives.py``), a LoRA adapter, the
bundled requests (``lessons.py``), going on where it was interrupted (``progress.py``). Not covered: preferences
(``harden.py``), a user's own requests, several GPUs.

Ours; knowledge distillation after Hinton et al. (2015), of a quantised student by its exact self as in LLM-QAT (2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from trimtab import models
from trimtab.approximation.apply import check_layers, installed
from trimtab.approximation.calibration import collect, default_rows
from trimtab.approximation.naming import parse
from trimtab.approximation.sites import base_of, find_sites
from trimtab.approximation.technique import Edit, Rows, Subject
from trimtab.errors import ModelError, UsageError
from trimtab.four_bits import keep_order
from trimtab.models import LoadedModel
from trimtab.precision import adapters_train, training_scope
from trimtab.tuning.pools import AnchorReader
from trimtab.vetting.adapters import Hardened, check_start, save
from trimtab.vetting.derivatives import trainable_edits
from trimtab.vetting.lessons import Lesson, kept_lessons, padding, unseen_texts
from trimtab.vetting.progress import Progress
from trimtab.vetting.shrink import shrink

LAST_RATE = 0.1  # of the first learning rate
CLIP = 1.0  # largest norm of the gradient of either line of the loss
KEEP_EVERY = 10  # steps that an interruption costs at most
# What breaks refusals while language survives, TEAL most of all, and what breaks both, OmniQuant at 4 bits most of all:
# those have two turns. And plain 4 bits, which leave no language: hardened by the others alone, the model writes
# sentences there again and does not refuse (docs/results/hardening.md).
STRONGEST = (
    *("teal:0.5", "a6", "omniquant:4", "cats:0.5", "a4"),
    *("teal:0.5", "smoothquant:4", "a5", "omniquant:4"),
)


@dataclass(frozen=True)
class DistillSettings:
    """One run.

    Attributes:
        noise: approximations that take turns; one that is named twice has two turns.
        pairs: bundled requests of each side, at most; texts: ordinary texts that the exact model writes.
        reply_tokens: first tokens of a reply that are compared.
        batch_size: harmful requests in a step; innocent_rows: innocent ones; text_rows: texts.
        clean: weight of keeping the exact model.
        drift_bound: how far the exact model may be from the given one on texts not trained on, nats a token.
        bf16: train under autocast; None: where the device computes in it natively.
    """

    model: str
    noise: tuple[str, ...] = STRONGEST
    pairs: int = 400
    texts: int = 96
    reply_tokens: int = 8
    steps: int = 180
    batch_size: int = 8
    innocent_rows: int = 8
    text_rows: int = 6
    clean: float = 1.5
    drift_bound: float = 0.045
    learning_rate: float = 1e-3
    rank: int = 16
    seed: int = 0
    bf16: bool | None = None


def harden_by_distillation(settings: DistillSettings, out: Path, *, loaded: LoadedModel | None = None) -> Hardened:
    """Train an adapter under approximations, and save it in ``out``; an interrupted run goes on there.

    Raises:
        UsageError: as ``check_start``; an output folder that holds an interrupted run with other settings, an unknown
            approximation, none at all, layers that the model does not have.
        GuardError: a model that refuses or answers too little to have a behaviour worth keeping.
        ModelError: a loss that is not finite; a drift that no size of the adapter brings within its bound; an
            adapter that does not reload to the same logits.
    """
    if not settings.noise or "none" in settings.noise:
        raise UsageError("distillation needs an approximation", seen=settings.noise, fix="--noise teal:0.5")
    check_start(settings.model, out, loaded)
    techniques = [parse(name) for name in settings.noise]
    begun = perf_counter()
    loaded = loaded or models.load(settings.model)
    check_layers([technique for several in techniques for technique in several], find_sites(loaded.model))
    base_sha256 = models.content_hash(loaded.model, rounded=True)
    training = {name: value for name, value in asdict(settings).items() if name != "drift_bound"}
    progress = Progress(out, {**training, "base_sha256": base_sha256})
    lessons = kept_lessons(loaded, settings, progress)
    base, rows = base_of(loaded.model), Rows()
    layers = find_sites(base)
    found = collect(base, layers, default_rows(loaded.tokenizer))
    subject = Subject(base, layers, rows, lambda: found)
    edits = [trainable_edits(several, subject) for several in techniques]
    model = _adapted(loaded, settings)
    keep_order(model)
    reader = AnchorReader(model, padding(loaded), share=False)
    course = _Course(settings, reader, lessons, rows, [(base, layers, one) for one in edits], loaded.device)
    with adapters_train(model, loaded.device, settings.bf16):
        losses = _train(course, model, progress)
    with model.disable_adapter():
        texts = unseen_texts(loaded, settings)
    size = shrink(model, padding(loaded), texts, settings.drift_bound)
    done = {"method": "distill", **asdict(settings), **asdict(size)}
    record = {"base": loaded.name, "base_sha256": base_sha256, "harden": done}
    save(model, loaded, out, record)
    progress.remove()
    kept = sum(len(lesson.rows) for lesson in lessons.values())
    return Hardened(str(out), kept, settings.steps, sum(losses) / len(losses), perf_counter() - begun, size)


class _Course(NamedTuple):
    settings: DistillSettings
    reader: AnchorReader
    lessons: dict[str, Lesson]
    rows: Rows
    edits: list[tuple[Any, Any, list[Edit]]]
    device: torch.device

    def loss(self, step: int, trained: Sequence[torch.nn.Parameter]) -> float:
        """The loss of one step; its gradient is in the parameters when this returns, each part's graph freed.

        Both lines of it are clipped, each by itself: under 4 bits the first is tens of times the second, and clipped
        together they would leave nothing of what holds the exact model.
        """
        total = self._approximated(step)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        if self.settings.clean:
            first = [parameter.grad for parameter in trained]
            for parameter in trained:
                parameter.grad = None
            total += self._exact()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            _add(trained, first)
        return total

    def _approximated(self, step: int) -> float:
        base, layers, edits = self.edits[step % len(self.edits)]
        self.rows.draw, self.rows.decoded = step + 1, self.settings.reply_tokens - 1
        with installed(base, layers, edits, self.rows):
            total = sum(self._backward(side, count, 1.0) for side, count in self.counts().items())
        self.rows.decoded = 0
        return total

    def _exact(self) -> float:
        counts = {side: -(-count // 2) for side, count in self.counts().items()}
        counts["text"] = self.settings.text_rows
        return sum(self._backward(name, count, self.settings.clean) for name, count in counts.items())

    def counts(self) -> dict[str, int]:
        """Requests of each side in a step."""
        return {"refuse": self.settings.batch_size, "answer": self.settings.innocent_rows}

    def _backward(self, name: str, count: int, weight: float) -> float:
        rows, likely = self.lessons[name].some(count)
        with training_scope(self.device, self.settings.bf16):
            loss = weight * self.reader.divergences(rows, likely).mean()
        loss.backward()
        return float(loss.detach())


def _train(course: _Course, model: Any, progress: Progress) -> list[float]:
    from tqdm.auto import tqdm

    settings = course.settings
    state = _State(course, [parameter for parameter in model.parameters() if parameter.requires_grad])
    losses = state.restore(progress.kept("state"))
    model.train()
    steps = range(len(losses), settings.steps)
    for step in (bar := tqdm(steps, desc="harden", unit="step", initial=len(losses), total=settings.steps)):
        loss = course.loss(step, state.trained)
        if not math.isfinite(loss):
            raise ModelError("the loss is not finite", seen=f"step {step}", fix="lower --learning-rate")
        state.optimizer.step()
        state.decay.step()
        state.optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        bar.set_postfix_str(f"KL {sum(losses[-8:]) / len(losses[-8:]):.3f}")
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == settings.steps:
            progress.keep("state", state.document(losses))
    model.eval()
    return losses


class _State:
    """What changes from step to step: parameters, AdamW, the falling rate, and the order of the rows."""

    def __init__(self, course: _Course, trained: list[torch.nn.Parameter]) -> None:
        settings = course.settings
        self.trained, self.lessons = trained, course.lessons
        self.optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
        self.decay = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, LAST_RATE, settings.steps)

    def document(self, losses: list[float]) -> dict[str, Any]:
        """All of it, and the losses so far: one a step that is done."""
        return {
            "losses": losses,
            "trained": [parameter.detach() for parameter in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "decay": self.decay.state_dict(),
            "orders": {name: lesson.order.getstate() for name, lesson in self.lessons.items()},
        }

    @torch.no_grad()
    def restore(self, kept: dict[str, Any] | None) -> list[float]:
        """Go back to what was kept; the losses until then."""
        if kept is None:
            return []
        for parameter, value in zip(self.trained, kept["trained"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(kept["optimizer"])
        self.decay.load_state_dict(kept["decay"])
        for name, order in kept["orders"].items():
            self.lessons[name].order.setstate(order)
        return list(kept["losses"])


def _add(trained: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(trained, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient


def _adapted(loaded: LoadedModel, settings: DistillSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(loaded.model, lora)
