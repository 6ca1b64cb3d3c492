"""``trimtab patch``: from a model's name to a saved, verified repair.

Covered: loading, before and after on the evaluation prompts, the decision, saving, the card. Not covered: the repair
itself (``methods.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import models
from trimtab.comparison import Policy, Run
from trimtab.errors import DataError, ModelError
from trimtab.evaluation.runner import default_axes, evaluate
from trimtab.exact_model import require_exact
from trimtab.model_names import ModelSpec
from trimtab.models import LoadedModel
from trimtab.patching import save
from trimtab.patching.adapters import require_finite, with_revision
from trimtab.patching.methods import Patched, PatchSettings, apply
from trimtab.patching.recipe import recipe, recipe_lines
from trimtab.patching.texts import bundled_material, near_duplicates
from trimtab.patching.verify import Verdict, decide

Say = Callable[[str], object]
STANDARD = ("compliance", "over_refusal")  # on which the aligned model is the standard; the rest would cost time


@dataclass(frozen=True)
class PatchResult:
    """What ``run`` did. ``saved``: folder, or None. ``bytes``: of the weights written."""

    saved: str | None
    changed: bool
    samples: int
    steps: int
    repair_seconds: float
    seconds: float
    bytes: int
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict | None

    @property
    def exit_code(self) -> int:
        """0 saved or nothing to do, 3 refused."""
        return 3 if self.refusals and self.saved is None else 0

    @property
    def title(self) -> str:
        """Of the page. Its reference is the broken model, so more refusals than before look worse than they are."""
        done = "accepted" if not self.refusals else "saved by force" if self.saved else "refused"
        return f"Repair {done}: before and after (over-refusal is judged against the aligned model where there is one)"

    def lines(self) -> list[str]:
        """For a person."""
        notes = [f"note: {note}" for note in self.notes]
        if not self.changed:
            return ["not broken: nothing was changed, nothing was written", *notes]
        done = (
            f"{self.samples} sample{'s' if self.samples > 1 else ''}, {self.steps} steps, {self.repair_seconds:.0f} s "
            f"of repair, {self.seconds:.0f} s in all"
        )
        if self.saved is None:
            fix = "nothing was written; --force saves it all the same, --aligned and --keep make a better repair"
            return [*(f"REFUSED: {reason}" for reason in self.refusals), fix, done, *notes]
        forced = [f"forced although: {reason}" for reason in self.refusals]
        return [f"saved to {self.saved} ({self.bytes / 1e6:.1f} MB): {done}", *forced, *notes]


def run(name: str, out: Path, settings: PatchSettings, *, evaluation: Path | None = None, say: Say = print,
        **how: Any) -> PatchResult:  # fmt: skip
    """Load, measure, repair, save, load again, measure again, compare, and keep or drop.

    Args:
        out: folder for the adapter or model; must not exist, and appears only when the repair is accepted.
        evaluation: folder for the logs of before and after, kept in any case; default ``out`` + "-eval".
        how: passed to ``models.load`` (dtype, device, chat_template, revision).

    Raises:
        as ``patch``; UsageError where ``out`` is not empty or has no name; DataError where samples are among the
        prompts that judge them; ModelError where a whole model is to be written from quantised weights.
    """
    started = time.monotonic()
    _require_disjoint(settings)
    for one in (name, settings.aligned):
        require_exact(one, "patch")
    scratch = save.Scratch(out)
    try:
        name = with_revision(name, how.pop("revision", None))  # it belongs to this model, not to the others
        loaded = models.load(name, **how)
        known = _known(loaded, how)
        _require_mergeable(loaded, settings)
        require_finite(loaded)
        logs = evaluation or out.with_name(out.name + "-eval")
        before = _measure(loaded, settings, logs / "before")
        ancestor = None if settings.aligned in ("auto", "none") else _load_alike(settings.aligned, known)
        standard = _measure(ancestor, settings, logs / "aligned", STANDARD) if ancestor is not None else None
        patched = apply(loaded, settings, ancestor, say)
        if not patched.changed:
            say("the model was not broken: nothing was written")
            return _result(None, patched, started, 0, None)
        size, again = _write(patched, loaded, scratch.path, settings, known)
        if standard is None and patched.details.get("ancestor"):  # the base under the adapter
            standard = _measure(_load_alike(patched.base, known), settings, logs / "aligned", STANDARD)
        after = _measure(replace(again, name=str(out)), settings, logs / "after")
        verdict = decide(before, after, standard, Policy())
        if not verdict.refusals or settings.force:
            _document(scratch.path, name, patched, verdict, settings)
            scratch.accept()
            return _result(out, patched, started, size, verdict)
        return _result(None, patched, started, size, verdict)
    finally:
        scratch.drop()


def _require_disjoint(settings: PatchSettings) -> None:
    """Nothing that the repair learns from may be among the prompts that judge it."""
    learnt = [anchor.request for anchor in settings.samples.anchors] if settings.samples else []
    learnt += [chat[-1]["content"] for chat in settings.keep]
    asked = [prompt.text for axis in settings.axes or default_axes() for prompt in axis.prompts().prompts]
    if shared := near_duplicates(learnt, asked):
        seen = f"{len(shared)}, first: {shared[0][:60]!r}"
        raise DataError("samples or prompts to keep are among the verified prompts", seen=seen, fix="take others")
    if settings.method == "two-sided" and (shared := near_duplicates(learnt, _held_out())):
        seen = f"{len(shared)}, first: {shared[0][:60]!r}"
        raise DataError("samples or prompts to keep are among the held-out prompts", seen=seen, fix="take others")


def _held_out() -> list[str]:
    """The bundled prompts that decide when a two-sided repair stops."""
    held = bundled_material().held_out
    return [chat[-1]["content"] for chat in (*held.harmful, *held.innocent, *held.ordinary)]


def _known(loaded: LoadedModel, how: dict[str, Any]) -> dict[str, Any]:
    """How the given model was loaded, whether the name or the caller said so: the result, its base and the aligned
    model are loaded likewise. The dtype is the one that it has: the default of a later load may be another."""
    written = {key: how.get(key) for key in ("dtype", "device", "chat_template")}
    spec = ModelSpec.parse(loaded.name, **written)
    known = {**how, **{key: value for key in written if (value := getattr(spec, key)) is not None}}
    if not getattr(loaded.model, "is_quantized", False):  # there the loader chooses what it does not pack
        known["dtype"] = str(save.dtype_of(loaded.model)).removeprefix("torch.")
    return known


def _load_alike(name: str, known: dict[str, Any]) -> LoadedModel:
    """Another model as the given one was loaded, where its own name does not say otherwise."""
    own = ModelSpec.parse(name)
    return models.load(name, **{key: value for key, value in known.items() if getattr(own, key, None) is None})


def _require_mergeable(loaded: LoadedModel, settings: PatchSettings) -> None:
    if getattr(loaded.model, "is_quantized", False) and (settings.merged or settings.full):
        fix = "leave --merged and --full out: the repair is then an adapter on the quantised model"
        raise ModelError("a whole model cannot be written from quantised weights", seen=loaded.name, fix=fix)


def _measure(loaded: LoadedModel, settings: PatchSettings, folder: Path, kinds: tuple[str, ...] = ()) -> Run:
    """On all axes, or on those of some kinds."""
    axes = [axis for axis in settings.axes or default_axes() if not kinds or axis.kind in kinds]
    return evaluate(
        loaded,
        axes,
        out=folder,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=False,
    )


def _write(
    patched: Patched, loaded: LoadedModel, folder: Path, settings: PatchSettings, known: dict[str, Any]
) -> tuple[int, LoadedModel]:
    """Save, load back, compare; the loaded one is what is verified."""
    made, dtype = patched.model, save.dtype_of(patched.model)
    expected = save.probe(replace(loaded, model=made))
    if not (settings.full or settings.merged):
        size = save.write_adapter(made, loaded.tokenizer, folder, patched.base)
        return size, save.reload(folder, expected, exact=dtype.itemsize == 4, made=made, **known)
    if settings.merged and not settings.full:
        made = made.merge_and_unload()
        merged = save.probe(replace(loaded, model=made))
        save.require_close(merged, expected, save.tolerance(dtype))  # merging rounds; writing must not
        expected = merged
    size = save.write_model(made, loaded.tokenizer, folder)
    return size, save.reload(folder, expected, exact=False, made=made, **known)


def _document(folder: Path, name: str, patched: Patched, verdict: Verdict, settings: PatchSettings) -> None:
    from trimtab import reports

    notes = [*patched.notes, *verdict.warnings]
    if verdict.refusals:
        notes.append(f"saved by --force although: {'; '.join(verdict.refusals)}")
    table = reports.to_markdown([verdict.comparison])
    what = [f"model: {name}", *patched.what, *recipe_lines(settings)]
    card = save.card(f"{name}, repaired", what, table, notes, whole=settings.full or settings.merged)
    (folder / "README.md").write_text(card, encoding="utf-8")
    save.record(folder, {
        "given": name, "base": patched.base, "method": settings.method, "samples": patched.samples,
        "steps": patched.steps, "seconds": round(patched.seconds, 1), "forced": bool(verdict.refusals),
        "refusals": list(verdict.refusals), "notes": notes, "details": patched.details,
        **recipe(settings),
    })  # fmt: skip


def _result(out: Path | None, patched: Patched, started: float, size: int, verdict: Verdict | None) -> PatchResult:
    notes = [*patched.notes, *(verdict.warnings if verdict else ())]
    return PatchResult(str(out) if out else None, patched.changed, patched.samples, patched.steps,
                       round(patched.seconds, 1), round(time.monotonic() - started, 1), size,
                       verdict.refusals if verdict else (), tuple(notes), verdict)  # fmt: skip
