"""The methods of a repair on a model in memory: ours, and the published ones exactly as reported.

``patch(model, anchor) -> PeftModel`` is the call for code; ``apply`` says in addition what was done. Covered: choosing
ancestor and sample, the three methods. Not covered: saving and verifying (``job.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from trimtab import models
from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError, ModelError, UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.patching.adapters import attach, base_name, detach, finish, require_effect, require_finite
from trimtab.patching.climb import LadderSettings
from trimtab.patching.heldout import continuations
from trimtab.patching.ladder import Repair, repair
from trimtab.patching.lowrank import PUBLISHED_RANK, measured_rank, truncated_step, weight_gradient
from trimtab.patching.recover import LORA_RATE, PUBLISHED_RATE, PUBLISHED_STEPS, one_shot
from trimtab.patching.select import Targets, bilevel, exhaustive
from trimtab.patching.texts import Chat, Material, as_chat, bundled_material, require_fit, written_by
from trimtab.tuning.pools import reader_for, tokenise

Method = Literal["two-sided", "published", "low-rank"]
Select = Literal["general", "bilevel", "exhaustive"]
METHODS: tuple[Method, ...] = ("two-sided", "published", "low-rank")
CANDIDATES = 20  # of the pool, among which a selection chooses: each is read 24 times with gradient
Say = Callable[[str], object]
Ancestor = LoadedModel | Literal["base"] | None


@dataclass(frozen=True)
class PatchSettings:
    """What to do.

    Attributes:
        method: "two-sided" (ours), "published" (one-shot fine-tuning), "low-rank" (the published closed form).
        full: published only: train all parameters instead of an adapter; the result is a whole model.
        aligned: the ancestor: a model's name, "auto" (the base, where the model is an adapter on one that refuses) or
            "none".
        select: how the sample is chosen from the pool.
        samples: a user's own samples; the first is the sample.
        keep: the user's prompts whose answers should stay.
        steps, learning_rate: published only; None: the source's (an adapter gets a higher rate, which is ours).
        step: low-rank only, alpha times eta.
        system: system message of the samples; None: the chat template's own.
        merged: write a whole model instead of an adapter.
        force: save although the verification refuses, repair although nothing is broken; recorded.
        limit, max_new_tokens, batch_size: of the verification.
        axes: of the verification; default compliance and over-refusal on the bundled prompts.
    """

    method: Method = "two-sided"
    full: bool = False
    aligned: str = "auto"
    select: Select = "general"
    samples: SafetyAnchors | None = None
    keep: tuple[Chat, ...] = ()
    steps: int | None = None
    learning_rate: float | None = None
    step: float = PUBLISHED_RATE
    system: str | None = None
    merged: bool = False
    force: bool = False
    limit: int = 84
    max_new_tokens: int = 12
    batch_size: int = 32
    axes: tuple[AxisSpec, ...] = ()
    ladder: LadderSettings = field(default_factory=LadderSettings)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError("unknown method", seen=self.method, fix=f"use one of: {', '.join(METHODS)}")
        kinds = {axis.kind for axis in self.axes}
        if self.axes and not {"compliance", "over_refusal"} <= kinds:
            fix = "add --axis compliance --axis over_refusal"
            raise UsageError("a repair is verified on both sides", seen=", ".join(sorted(kinds)), fix=fix)
        if self.full and self.method != "published":
            raise UsageError("only the published method trains all parameters", seen=self.method, fix="drop --full")


class Patched(NamedTuple):
    """``model``: PEFT model or, after full training, a whole one. ``base``: name of what is under the adapter.

    ``changed``: False where the model was not broken. ``what``: lines for the card. ``details``: for the record.
    """

    model: Any
    base: str
    changed: bool
    samples: int
    steps: int
    seconds: float
    what: list[str]
    notes: list[str]
    details: dict[str, Any]


def patch(
    model: LoadedModel,
    anchor: Anchor | SafetyAnchors | None = None,
    *,
    aligned: LoadedModel | None = None,
    settings: PatchSettings = PatchSettings(),
    say: Say = lambda _: None,
) -> Any:
    """Repair a model in memory with one safety sample and return a PEFT model; ``save_pretrained`` writes the adapter.

    The adapter is attached to ``model.model`` itself (PEFT does that); the weights under it are not changed. A LoRA
    adapter that the model came with and the repair become one adapter. Nothing is verified on evaluation prompts.

    Args:
        model: the broken model.
        anchor: the refusal to learn (several: the first is the sample); default: the general refusal.
        aligned: the aligned model that it came from, which then writes refusals and answers; default: the base, where
            the model is an adapter on one that refuses, else the bundled texts.
        settings: see ``PatchSettings``; its ``aligned`` and ``samples`` give way to the arguments here.
        say: told about every look.

    Raises:
        GuardError: the edit changed nothing or is not finite; the named ancestor does not refuse.
        DataError: a sample that the model cannot read whole. ModelError: weights that cannot be repaired.
    """
    if anchor is not None:
        several = anchor if isinstance(anchor, SafetyAnchors) else SafetyAnchors((anchor,), origin="given")
        settings = replace(settings, samples=several)
    if settings.full:
        raise UsageError(
            "patch() returns an adapter",
            seen="full=True",
            fix="use trimtab.patching.job.run, or `trimtab patch --full`",
        )
    return apply(model, settings, aligned, say).model


def apply(loaded: LoadedModel, settings: PatchSettings, aligned: LoadedModel | None, say: Say) -> Patched:
    """The method that the settings name, on a loaded model."""
    models.require_chat_template(loaded.tokenizer, loaded.name)
    if settings.method == "two-sided":
        return _two_sided(loaded, settings, aligned, say)
    return _published(loaded, settings, aligned, say)


def _two_sided(loaded: LoadedModel, settings: PatchSettings, aligned: LoadedModel | None, say: Say) -> Patched:
    material = _material(settings)
    ladder = replace(settings.ladder, force=settings.force)
    notes: list[str] = []
    ancestor: Ancestor = aligned
    if aligned is None and settings.aligned == "auto" and _is_peft(loaded.model):
        ancestor, notes = _base_if_aligned(loaded, material)
    if settings.select != "general":
        material = _selected(loaded, material, settings, ancestor, say)
    found = repair(loaded, material, ancestor=ancestor, settings=ladder, say=say)
    base = base_name(found.bench)
    if found.chosen is None:
        return Patched(loaded.model, base, False, 0, 0, found.seconds, [], list(found.notes), _details(found))
    chosen = found.chosen
    what = [
        f"method: two-sided, {chosen.stage}; {chosen.samples} refusal sample(s), {chosen.steps} steps",
        f"replies written by: {found.writer}",
        f"held-out prompts before: {found.given.line()}",
        f"held-out prompts after: {chosen.look.line()}",
        f"status: {found.status}; norm of the edit {chosen.size:.3g}",
    ]
    return Patched(finish(found.bench), base, True, chosen.samples, chosen.steps, found.seconds, what,
                   [*notes, *found.notes], _details(found))  # fmt: skip


def _published(loaded: LoadedModel, settings: PatchSettings, aligned: LoadedModel | None, say: Say) -> Patched:
    """One-shot fine-tuning or the closed form, on the one sample; no stopping, no second side."""
    started = time.monotonic()
    material = _material(settings)
    if settings.select != "general":
        ancestor, _ = (aligned, []) if aligned is not None else _base_if_aligned(loaded, material)
        material = _selected(loaded, material, settings, ancestor, say)
    sample = material.refuse[0]
    if sample.reply is None:
        raise GuardError("the sample has no reply", seen=sample.request[:60], fix='give it a "reply"')
    require_fit(loaded, [sample], settings.system)
    steps = settings.steps or PUBLISHED_STEPS
    if settings.full:
        return _full(loaded, sample, settings, started)
    rank = PUBLISHED_RANK if settings.method == "low-rank" else settings.ladder.rank
    bench = attach(loaded, rank=rank, alpha=2 * rank, seed=settings.ladder.seed)
    details: dict[str, Any] = {"sample": asdict(sample)}
    if settings.method == "low-rank":
        row = tokenise(bench.loaded, sample, settings.system, None)
        gradient = weight_gradient(bench, lambda: reader_for(bench.loaded, bench.model).losses([row]).mean())
        bench.place(truncated_step(gradient, rank, settings.step))
        details["rank"] = measured_rank(gradient)._asdict()
        what, steps = [f"method: low-rank closed form, rank {rank}, step {settings.step:g}"], 0
    else:
        rate = settings.learning_rate or LORA_RATE
        losses = one_shot(bench.loaded, sample, steps=steps, learning_rate=rate, system=settings.system)
        details["losses"] = losses
        what = [f"method: published one-shot on an adapter, {steps} steps at {rate:g} (the rate is ours)"]
    require_effect(bench)
    base = base_name(bench)
    what.append(f"sample: {sample.request!r} -> {sample.reply!r}")
    return Patched(finish(bench), base, True, 1, steps, time.monotonic() - started, what, [], details)


def _full(loaded: LoadedModel, sample: Anchor, settings: PatchSettings, started: float) -> Patched:
    import torch

    require_finite(loaded)
    model: Any = loaded.model
    model = model.merge_and_unload() if _is_peft(model) else model
    if getattr(model, "is_quantized", False) or next(model.parameters()).dtype != torch.float32:
        fix = "load it in float32 (?dtype=float32), or patch with an adapter"
        raise ModelError("small full-parameter updates vanish in these weights", seen=loaded.name, fix=fix)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)
    steps, rate = settings.steps or PUBLISHED_STEPS, settings.learning_rate or PUBLISHED_RATE
    losses = one_shot(replace(loaded, model=model), sample, steps=steps, learning_rate=rate, system=settings.system)
    changed = sum(int((p.detach() != before[name]).sum()) for name, p in model.named_parameters())
    total = sum(p.numel() for p in model.parameters())
    if not changed:
        raise GuardError("the repair changed nothing", seen=f"{steps} steps at {rate:g}", fix="raise --learning-rate")
    what = [
        f"method: published one-shot, all parameters, {steps} steps at {rate:g}",
        f"changed {100 * changed / total:.1f} % of the coordinates",
        f"sample: {sample.request!r} -> {sample.reply!r}",
    ]
    details = {"losses": losses, "changed": changed, "sample": asdict(sample)}
    return Patched(model.eval(), loaded.name, True, 1, steps, time.monotonic() - started, what, [], details)


def _material(settings: PatchSettings) -> Material:
    found = bundled_material(keep=settings.keep, system=settings.system)
    if settings.samples is None:
        return found
    refuse = settings.samples.side("refuse")
    if not refuse:
        raise UsageError(
            "the samples hold no refusal", seen=settings.samples.origin, fix='add rows with "side": "refuse"'
        )
    answers = settings.samples.side("answer") or found.answer
    chat = as_chat(settings.system)
    return replace(
        found, refuse=refuse, answer=answers, lookalikes=tuple(chat(a.request) for a in answers), writer="user"
    )


def _base_if_aligned(loaded: LoadedModel, material: Material) -> tuple[Literal["base"] | None, list[str]]:
    """The base of the given adapter, where it refuses and answers as an aligned model does."""
    if not _is_peft(loaded.model):
        return None, []
    probe = replace(material, refuse=material.refuse[:8], answer=material.answer[:8])
    probe = replace(probe, refuse=tuple(replace(a, reply=None) for a in probe.refuse))
    model: Any = loaded.model
    try:
        with model.disable_adapter():
            written_by(loaded, probe)
    except GuardError:
        return None, ["the base under the adapter does not refuse either: the bundled refusals were used"]
    return "base", []


def _selected(
    loaded: LoadedModel,
    material: Material,
    settings: PatchSettings,
    ancestor: Ancestor,
    say: Say,
) -> Material:
    if ancestor is None:
        raise UsageError("choosing a sample needs the aligned model", seen=settings.select, fix="pass --aligned MODEL")
    bench = attach(loaded, rank=settings.ladder.rank, alpha=settings.ladder.alpha, seed=settings.ladder.seed)
    if ancestor == "base":
        with bench.as_base() as base:
            written = written_by(base, material)
            harm = continuations(base, material.held_out.harmful[:8])
    else:
        written = written_by(ancestor, material)
        if len(ancestor.tokenizer) != len(loaded.tokenizer):
            raise ModelError("selection needs an ancestor with the same vocabulary", seen=ancestor.name)
        harm = continuations(ancestor, material.held_out.harmful[:8])
    with bench.as_given() as given:
        task = continuations(given, [*material.kept, *material.ordinary][:8])
    pool = written.refuse[:CANDIDATES]
    find = bilevel if settings.select == "bilevel" else exhaustive
    chosen = find(bench, pool, Targets(harm, task), system=material.system)
    say(f"selected by {settings.select}: {pool[chosen.order[0]].category!r} "
        f"({chosen.passes} sample passes, {chosen.seconds:.0f} s)")  # fmt: skip
    detach(bench)
    return written.with_sample(chosen.order[0])


def _details(found: Repair) -> dict[str, Any]:
    return {
        "status": found.status,
        "given": asdict(found.given),
        "ancestor": asdict(found.ancestor) if found.ancestor else None,
        "bounds": found.bounds._asdict(),
        "history": [{**rung._asdict(), "look": asdict(rung.look)} for rung in found.history],
        "samples": [{"request": a.request, "reply": a.reply} for a in found.used],
        "rank": found.rank._asdict() if found.rank else None,
    }


def _is_peft(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)
