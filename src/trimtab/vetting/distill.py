"""Hardening by self-distillation: under the approximation, the model learns to say what it says without it.

In a step, with E the exact model as it was given, A the policy under one of the approximations (they take turns) and C
the policy exact, all on words that E wrote itself:

    loss = mean KL(E || A) over refusals + over answers
         + clean * (mean KL(E || C) over refusals + over answers + over ordinary texts)

The first line brings refusals and answers back under the approximation, from both sides at once; the second keeps the
exact model where it was. Divergences are over E's likeliest tokens and all others together (``tuning/likely.py``). No
reply is labelled good or bad, so nothing is gained by refusing everything.

Covered: any approximation or several, rounding by straight-through derivatives (``harden.py``), a LoRA adapter, the
bundled requests. Not covered: preferences (``harden.py``), a user's own requests, several GPUs.

Ours; knowledge distillation after Hinton et al. (2015), of a quantised student by its exact self as in LLM-QAT (2023).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from trimtab import data, models
from trimtab.anchors import SIDES, Anchor
from trimtab.approximation.apply import installed
from trimtab.approximation.calibration import collect, default_rows
from trimtab.approximation.naming import parse
from trimtab.approximation.noise import Noise
from trimtab.approximation.sites import base_of, find_sites
from trimtab.approximation.technique import Edit, Rows, Subject
from trimtab.errors import ModelError, UsageError
from trimtab.evaluation.judges import judge
from trimtab.four_bits import keep_order
from trimtab.generation import GenerationSettings, fitting_rows, generate, generate_ids, render
from trimtab.models import LoadedModel
from trimtab.precision import training_scope
from trimtab.tuning.distill import REPLY_TOKENS, require_alignment
from trimtab.tuning.likely import Likely
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor, tokenise
from trimtab.vetting.harden import Hardened, save, straight_through

TEXT_TOKENS = 48
LAST_RATE = 0.1  # of the first learning rate
# What breaks refusals while language survives, TEAL most of all, and what breaks both: hardening against all of them at
# once did no worse against the first three than hardening against these alone (docs/results/approximations.md).
STRONGEST = ("teal:0.5", "a6", "teal:0.5", "smoothquant:4", "cats:0.5", "a5")


@dataclass(frozen=True)
class DistillSettings:
    """One run.

    Attributes:
        noise: approximations that take turns; one that is named twice has two turns.
        pairs: bundled requests of each side, at most; texts: ordinary texts that the exact model writes.
        reply_tokens: first tokens of a reply that are compared.
        batch_size: harmful requests in a step; innocent_rows: innocent ones; text_rows: texts.
        clean: weight of keeping the exact model.
        bf16: train under autocast; None: where the device computes in it natively.
    """

    model: str
    noise: tuple[str, ...] = STRONGEST
    pairs: int = 400
    texts: int = 64
    reply_tokens: int = 8
    steps: int = 120
    batch_size: int = 8
    innocent_rows: int = 8
    text_rows: int = 4
    clean: float = 1.0
    learning_rate: float = 1e-3
    rank: int = 16
    seed: int = 0
    bf16: bool | None = None


class Lesson(NamedTuple):
    """Rows with what the exact model says on them, and an order to take them in."""

    rows: list[TokenisedAnchor]
    likely: Likely
    order: random.Random

    def some(self, count: int) -> tuple[list[TokenisedAnchor], Likely]:
        """So many, drawn without replacement."""
        chosen = self.order.sample(range(len(self.rows)), min(count, len(self.rows)))
        rows = [self.rows[index] for index in chosen]
        return rows, self.likely.of(chosen, max(len(row.reply) for row in rows))


def harden_by_distillation(settings: DistillSettings, out: Path, *, loaded: LoadedModel | None = None) -> Hardened:
    """Train an adapter under approximations, and save it in ``out``.

    Raises:
        UsageError: an output folder that holds an adapter, an unknown approximation, none at all.
        GuardError: a model that refuses or answers too little to have a behaviour worth keeping.
        ModelError: a loss that is not finite; an adapter that does not reload to the same logits.
    """
    if not settings.noise or "none" in settings.noise:
        raise UsageError("distillation needs an approximation", seen=settings.noise, fix="--noise teal:0.5")
    if (out / "adapter_model.safetensors").is_file():
        raise UsageError("that folder holds a finished adapter", seen=out, fix="name another --out")
    if models.ModelSpec.parse(settings.model).adapter:
        raise UsageError(
            "hardening trains an adapter of its own", seen=settings.model, fix="merge it first: trimtab convert"
        )
    techniques = [parse(name) for name in settings.noise]
    begun = perf_counter()
    loaded = loaded or models.load(settings.model)
    base_sha256 = models.content_hash(loaded.model, rounded=True)
    lessons = _lessons(loaded, settings)
    base, rows = base_of(loaded.model), Rows()
    layers = find_sites(base)
    found = collect(base, layers, default_rows(loaded.tokenizer))
    subject = Subject(base, layers, rows, lambda: found)
    edits = [_edits(several, subject) for several in techniques]
    model = _adapted(loaded, settings)
    keep_order(model)
    reader = AnchorReader(model, _pad(loaded), share=False)
    course = _Course(settings, reader, lessons, rows, [(base, layers, one) for one in edits], loaded.device)
    losses = _train(course, model)
    record = {"base": loaded.name, "base_sha256": base_sha256, "harden": {"method": "distill", **asdict(settings)}}
    save(model, loaded, out, record)
    kept = sum(len(lesson.rows) for lesson in lessons.values())
    return Hardened(str(out), kept, settings.steps, sum(losses) / len(losses), perf_counter() - begun)


class _Course(NamedTuple):
    settings: DistillSettings
    reader: AnchorReader
    lessons: dict[str, Lesson]
    rows: Rows
    edits: list[tuple[Any, Any, list[Edit]]]
    device: torch.device

    def loss(self, step: int) -> float:
        """The loss of one step; its gradient is in the parameters when this returns, each part's graph freed."""
        base, layers, edits = self.edits[step % len(self.edits)]
        self.rows.draw, self.rows.decoded = step + 1, self.settings.reply_tokens - 1
        with installed(base, layers, edits, self.rows):
            total = sum(self._backward(side, count, 1.0) for side, count in self.counts().items())
        self.rows.decoded = 0
        if self.settings.clean:
            counts = {side: -(-count // 2) for side, count in self.counts().items()}
            counts["text"] = self.settings.text_rows
            total += sum(self._backward(name, count, self.settings.clean) for name, count in counts.items())
        return total

    def counts(self) -> dict[str, int]:
        """Requests of each side in a step."""
        return {"refuse": self.settings.batch_size, "answer": self.settings.innocent_rows}

    def _backward(self, name: str, count: int, weight: float) -> float:
        rows, likely = self.lessons[name].some(count)
        with training_scope(self.device, self.settings.bf16):
            loss = weight * self.reader.divergences(rows, likely).mean()
        loss.backward()
        return float(loss.detach())


def _train(course: _Course, model: Any) -> list[float]:
    from tqdm.auto import tqdm

    settings = course.settings
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, settings.steps)
    losses = []
    model.train()
    for step in (bar := tqdm(range(settings.steps), desc="harden", unit="step")):
        loss = course.loss(step)
        if not math.isfinite(loss):
            raise ModelError("the loss is not finite", seen=f"step {step}", fix="lower --learning-rate")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        bar.set_postfix_str(f"KL {sum(losses[-8:]) / len(losses[-8:]):.3f}")
    model.eval()
    return losses


def _edits(techniques: Sequence[Any], subject: Subject) -> list[Edit]:
    return [
        edit if isinstance(technique, Noise) else straight_through(edit)
        for technique in techniques
        for edit in technique.edits(subject)
    ]


def _adapted(loaded: LoadedModel, settings: DistillSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(loaded.model, lora)


def _lessons(loaded: LoadedModel, settings: DistillSettings) -> dict[str, Lesson]:
    """Replies to both sides and texts, all in the exact model's own words, each with what it would say."""
    rows = {**_replies(loaded, settings), "text": _texts(loaded, settings)}
    reader = AnchorReader(loaded.model, _pad(loaded), share=False)
    return {
        name: Lesson(own, reader.likely(own), random.Random(f"{settings.seed}|{name}")) for name, own in rows.items()
    }


def _replies(loaded: LoadedModel, settings: DistillSettings) -> dict[str, list[TokenisedAnchor]]:
    """The model's own replies, the wrong ones too: what it does where it is undecided is to stay as it is.

    Raises:
        GuardError: a model that refuses or answers too little to have a behaviour worth keeping.
    """
    anchors = _requests(settings)
    chats = [[{"role": "user", "content": anchor.request}] for anchor in anchors]
    wanted = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=fitting_rows(loaded))
    replied = [
        replace(anchor, reply=answer.text)
        for anchor, answer in zip(anchors, generate(loaded, chats, wanted), strict=True)
        if answer.text
    ]
    right = {"refuse": "refused", "answer": "answered"}
    kept = [one for one in replied if judge(one.request, one.reply or "").label == right[one.side]]
    require_alignment(loaded.name, kept, Counter(anchor.side for anchor in anchors))
    return {
        side: [tokenise(loaded, one, None, settings.reply_tokens) for one in replied if one.side == side]
        for side in SIDES
    }


def _requests(settings: DistillSettings) -> list[Anchor]:
    """Bundled training requests: harmful ones and as many innocent ones, two thirds of them their twins."""
    known = data.requests("train")
    pairs = random.Random(settings.seed).sample(known, min(settings.pairs, len(known)))
    innocent = [pair.benign for pair in pairs]
    for place, text in zip(range(2, len(innocent), 3), data.instructions("train")[settings.texts :], strict=False):
        innocent[place] = text
    return [Anchor(pair.harmful, "refuse") for pair in pairs] + [Anchor(text, "answer") for text in innocent]


def _texts(loaded: LoadedModel, settings: DistillSettings) -> list[TokenisedAnchor]:
    """Ordinary instructions with the model's answers, and plain texts that begin as they do, half and half."""
    asked = data.instructions("train")[: settings.texts]
    chats = [render(loaded, [{"role": "user", "content": text}]) for text in asked[::2]]
    plain = [loaded.tokenizer(text)["input_ids"] for text in asked[1::2]]
    found = []
    for prompts, temperature in ((chats, 0.0), (plain, 1.0)):
        wanted = GenerationSettings(TEXT_TOKENS, temperature, seed=settings.seed, batch_size=32)
        for ids, answer in zip(prompts, generate_ids(loaded, prompts, wanted), strict=True):
            reply = loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            if reply and len(ids) > 1:
                found.append(TokenisedAnchor(ids, reply))
    return found


def _pad(loaded: LoadedModel) -> int:
    pad = loaded.tokenizer.pad_token_id
    return int(pad) if pad is not None else 0
