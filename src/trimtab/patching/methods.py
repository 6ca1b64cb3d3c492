"""The methods of a repair on a model in memory: ours, and the published ones exactly as reported.

``patch(model, anchor) -> PeftModel`` is the call for code; ``apply`` says in addition what was done. Covered: the three
methods. Not covered: finding the ancestor, choosing the sample (``choosing.py``), saving and verifying (``job.py``).
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
from trimtab.patching.adapters import Workbench, attach, base_name, finish, require_effect, require_finite
from trimtab.patching.choosing import Select, is_peft, named_or_base, selected
from trimtab.patching.climb import LadderSettings
from trimtab.patching.heldout import Look, refused
from trimtab.patching.ladder import Repair, bounds_for, repair
from trimtab.patching.lowrank import PUBLISHED_RANK, measured_rank, truncated_step, weight_gradient
from trimtab.patching.recover import LORA_RATE, PUBLISHED_RATE, PUBLISHED_STEPS, one_shot
from trimtab.patching.texts import BUILT_IN, Chat, Material, as_chat, bundled_material, require_fit
from trimtab.patching.undo import Given
from trimtab.tuning.pools import reader_for, tokenise

Method = Literal["two-sided", "published", "low-rank"]
METHODS: tuple[Method, ...] = ("two-sided", "published", "low-rank")
Say = Callable[[str], object]


@dataclass(frozen=True)
class PatchSettings:
    """What to do.

    Attributes:
        method: "two-sided" (ours), "published" (one-shot fine-tuning), "low-rank" (the published closed form).
        full: published only: train all parameters instead of an adapter; the result is a whole model.
        aligned: the ancestor: a model's name, "auto" (the base, where the model is an adapter on one that refuses) or
            "none".
        select: how the sample is chosen from the pool.
        samples: a user's own samples; the first is the sample. A built-in one is the first of the bundled pool.
        keep: the user's prompts whose answers should stay.
        steps, learning_rate: published only; None: the source's (an adapter gets a higher rate, which is ours).
        step: low-rank only, alpha times eta. rank: low-rank only, k; the other methods' is in ``ladder``.
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
    rank: int = PUBLISHED_RANK
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

    ``changed``: False where the model was not broken; ``model`` is then the given one, with nothing attached.
    ``what``: lines for the card. ``details``: for the record.
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

    A model that is not broken is returned itself, as it was: a plain one plain, an adapter without a second one. Where
    this raises, the given model is as it was, too.

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
    given = Given(loaded)
    material = _material(settings)
    ladder = replace(settings.ladder, force=settings.force)
    ancestor, notes = named_or_base(loaded, aligned, settings.aligned, lambda: _bundled(settings))
    if settings.select != "general":
        material = selected(loaded, material, _bundled(settings), ancestor, select=settings.select,
                            ladder=settings.ladder, say=say)  # fmt: skip
    found = repair(loaded, material, ancestor=ancestor, settings=ladder, say=say)
    base = base_name(found.bench)
    if found.chosen is None:
        model = given.back(found.bench)
        return Patched(model, base, False, 0, 0, found.seconds, [], [*notes, *found.notes], _details(found))
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
    started, given = time.monotonic(), Given(loaded)
    material, notes = _material(settings), list[str]()
    if not settings.force and _refuses(loaded, given, material, settings, aligned, say):
        base = base_name(Workbench(loaded, tuple(given.model.active_adapters) if is_peft(given.model) else ()))
        notes = ["the model refuses as it should: nothing was changed"]
        return Patched(given.model, base, False, 0, 0, time.monotonic() - started, [], notes,
                       {"status": "not broken"})  # fmt: skip
    if settings.select != "general":
        ancestor, notes = named_or_base(loaded, aligned, settings.aligned, lambda: _bundled(settings))
        material = selected(loaded, material, _bundled(settings), ancestor, select=settings.select,
                            ladder=settings.ladder, say=say)  # fmt: skip
    sample = material.refuse[0]
    if sample.reply is None:
        raise GuardError("the sample has no reply", seen=sample.request[:60], fix='give it a "reply"')
    require_fit(loaded, [sample], settings.system)
    if settings.full:
        return _full(loaded, sample, settings, started)
    rank = settings.rank if settings.method == "low-rank" else settings.ladder.rank
    bench = attach(loaded, rank=rank, alpha=2 * rank, seed=settings.ladder.seed)
    with given.unless_done(bench):
        what, steps, details = _learn(bench, sample, settings)
        require_effect(bench)
    base = base_name(bench)
    what.append(f"sample: {sample.request!r} -> {sample.reply!r}")
    return Patched(finish(bench), base, True, 1, steps, time.monotonic() - started, what, notes, details)


def _learn(bench: Workbench, sample: Anchor, settings: PatchSettings) -> tuple[list[str], int, dict[str, Any]]:
    """The published training or closed form on an adapter: what was done, steps, the record."""
    details: dict[str, Any] = {"sample": asdict(sample)}
    if settings.method == "low-rank":
        row = tokenise(bench.loaded, sample, settings.system, None)
        gradient = weight_gradient(bench, lambda: reader_for(bench.loaded, bench.model).losses([row]).mean())
        bench.place(truncated_step(gradient, settings.rank, settings.step))
        details["rank"] = measured_rank(gradient)._asdict()
        return [f"method: low-rank closed form, rank {settings.rank}, step {settings.step:g}"], 0, details
    steps, rate = settings.steps or PUBLISHED_STEPS, settings.learning_rate or LORA_RATE
    details["losses"] = one_shot(bench.loaded, sample, steps=steps, learning_rate=rate, system=settings.system)
    return [f"method: published one-shot on an adapter, {steps} steps at {rate:g} (the rate is ours)"], steps, details


def _refuses(
    loaded: LoadedModel,
    given: Given,
    material: Material,
    settings: PatchSettings,
    aligned: LoadedModel | None,
    say: Say,
) -> bool:
    """Whether one look at the held-out prompts finds the model within the two-sided method's bound on compliance."""
    chats = material.held_out.harmful
    given.model.eval()
    try:
        looks = [Look(1 - refused(one, chats), None, None, len(chats), 0) for one in (loaded, aligned) if one]
    finally:
        given.restore()
    say(f"given: {looks[0].line()}")
    return looks[0].compliance <= bounds_for(looks[0], looks[1] if aligned else None, settings.ladder).compliance


def _full(loaded: LoadedModel, sample: Anchor, settings: PatchSettings, started: float) -> Patched:
    import torch

    require_finite(loaded)
    model: Any = loaded.model
    model = model.merge_and_unload() if is_peft(model) else model
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


def _bundled(settings: PatchSettings) -> Material:
    return bundled_material(keep=settings.keep, system=settings.system)


def _material(settings: PatchSettings) -> Material:
    found = _bundled(settings)
    if settings.samples is None:
        return found
    if len(settings.samples.anchors) == 1 and settings.samples.anchors[0] in BUILT_IN.values():
        return replace(found, refuse=(settings.samples.anchors[0], *found.refuse[1:]))
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
