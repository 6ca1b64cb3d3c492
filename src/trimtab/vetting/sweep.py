"""Every approximation on every axis, paired with the exact model, in one folder that an interrupted sweep resumes from.

Each approximation leaves what `trimtab eval` leaves (inspect logs, ``results.json``) and ``approximation.json``: what
ran, its error at the sites, its cost. Comparing them is ``trimtab.comparison``'s work, the page ``report.py``'s.

Covered: techniques that fail on this model (recorded with their reason, "unmeasured" in the verdict, tried again by the
next call); a folder of other settings, or of a model whose weights are others now, is refused.
Not covered: several processes (``workers.py``); approximated servers (vLLM and the like do not run hooks):
approximated answers are Transformers' own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.approximation import naming
from trimtab.comparison.records import Run
from trimtab.errors import ApproximationError, DataError, UsageError
from trimtab.evaluation.judges import FINISHED_TOKENS
from trimtab.evaluation.logs import SUMMARY
from trimtab.exact_model import require_exact
from trimtab.models import LoadedModel, fingerprint, load
from trimtab.vetting import held as holding
from trimtab.vetting.bench import Bench, Speed, needs_calibration, timed
from trimtab.vetting.scrutiny import NOISE_BY, noise_apart, read_exact, read_vetted, scrutinise, write_exact, write_json
from trimtab.vetting.workers import fitting, measure_all

if TYPE_CHECKING:
    from trimtab.approximation.apply import Approximation
    from trimtab.evaluation.runner import AxisSpec

EXACT, RECORD, SETTINGS = "exact", "approximation.json", "settings.json"


@dataclass(frozen=True)
class VetSettings:
    """What every approximation is measured by. Lists of names may grow between two calls, these may not."""

    model: str
    axes: tuple[AxisSpec, ...]
    limit: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 32


@dataclass(frozen=True)
class Vetted:
    """One approximation. ``run``: noise apart (``scrutiny.py``); None: it could not be measured, ``failure`` says why.
    ``record``: as written."""

    name: str
    folder: Path
    run: Run | None
    record: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def sweep(
    settings: VetSettings,
    names: Sequence[str],
    out: Path,
    *,
    workers: int | None = 1,
    progress: bool = True,
    tell: Callable[[str], Any] = print,
) -> tuple[Run, list[Vetted]]:
    """Measure the exact model and every approximation; what is finished in ``out`` is kept, what failed tried again.

    Args:
        names: as ``naming.split_list`` gives them.
        workers: processes, each with its own copy of the model; None: as many as fit (``workers.fitting``). A script
            that asks for more than one needs ``if __name__ == "__main__"``.
        tell: called with one line after each approximation.

    Raises:
        UsageError: a folder with other settings, or of another model under the same name; a model name that carries an
            approximation; a range of layers that the model does not have. DataError, ModelError: as ``evaluate``.
    """
    require_exact(settings.model, "vet", ", use --approx")
    prompts = [spec.prompts() for spec in settings.axes]  # before the model: a wrong path should not cost a load
    if not prompts:
        raise UsageError("no axes to measure", fix="name at least one, e.g. compliance")
    held, wanted = _held(out, settings)
    missing = [name for name in names if not _finished(out, name)]
    kept = [name for name in names if name not in missing]
    files = holding.files_of(settings.model)
    to_do = bool(missing) or not (out / EXACT / SUMMARY).is_file()
    loaded = load(settings.model) if to_do or (files and files != held.get(holding.FILES)) else None
    _check_layers(loaded, missing)
    prints = fingerprint(loaded) if loaded is not None else {}
    _check_model(out, held, prints, kept)
    if prints:
        write_json(out / SETTINGS, {**wanted, holding.MODEL: prints, holding.FILES: files})
    bench = Bench(loaded) if loaded is not None and to_do else None
    base_run = _exact(bench, settings, out, progress)
    found = {name: _read(out, name) for name in kept}

    def done(name: str, vetted: Vetted, seconds: float) -> None:
        found[name] = vetted
        what = f"{vetted.failure}; the same command tries it again" if vetted.failure else "measured"
        tell(f"{name}: {what} ({seconds:.0f} s; {len(found)} of {len(set(names))})")

    if bench is not None and missing:
        workers = workers or fitting(bench.loaded, len(missing))
        if workers > 1:
            loaded = bench = None  # the processes load their own
            measure_all(settings, missing, out, workers, done)
        else:
            for name in missing:
                done(name, *vet_one(bench, settings, name, out, progress))
    return base_run, [found[name] for name in names]


def _check_layers(loaded: LoadedModel | None, names: Sequence[str]) -> None:
    """Before anything is measured: a name that fits no layer is a slip, and should not cost a sweep."""
    if loaded is None or not names:
        return
    from trimtab.approximation.apply import check_layers
    from trimtab.approximation.sites import find_sites

    layers = find_sites(loaded.model)
    for name in names:
        check_layers(naming.parse(name), layers)


def vet_one(bench: Bench, settings: VetSettings, name: str, out: Path, progress: bool) -> tuple[Vetted, float]:
    """Measure one approximation; the result and its wall seconds."""
    started = time.monotonic()
    return _measured(bench, settings, name, out, progress), time.monotonic() - started


def _measured(bench: Bench, settings: VetSettings, name: str, out: Path, progress: bool) -> Vetted:
    from trimtab.approximation.apply import approximate
    from trimtab.evaluation.runner import evaluate
    from trimtab.vetting.site_errors import measure

    folder = out / naming.slug(name)
    recording = bench.recording
    fluency, relevance = bench.fluency(settings.max_new_tokens), bench.relevance(settings.max_new_tokens)
    exact_seconds, exact_tokens = timed(bench.loaded)
    try:
        calibration = bench.calibration if needs_calibration(name) else None
        started = time.monotonic()
        with approximate(bench.loaded, name, calibration=calibration) as active:
            ready = time.monotonic() - started
            errors = measure(bench.base, bench.layers, recording, active)
            seconds, tokens = timed(bench.loaded)
            speed = Speed(exact_seconds, seconds, exact_tokens, tokens)
            renamed = replace(bench.loaded, name=_with_approx(settings.model, name))
            run = evaluate(
                renamed,
                list(settings.axes),
                out=folder,
                limit=settings.limit,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                progress=progress,
            )
            record = {
                "name": name,
                "label": active.label,
                "notes": [*active.notes, *_found(bench, active)],
                "setup_seconds": round(ready, 2),
                "speed": {**speed._asdict(), "cost": speed.cost, "rate": speed.rate, "exact_rate": speed.exact_rate},
                "errors": {kind: [shape.document() for shape in shapes] for kind, shapes in errors.items()},
                "out_of_range": {str(layer): list(found) for layer, found in active.out_of_range().items()},
            }
    except (ApproximationError, DataError) as error:
        failure = f"{error.what}" + (f" ({error.seen})" if error.seen is not None else "")
        write_json(folder / RECORD, {"name": name, "failure": failure})
        return Vetted(name, folder, None, {"name": name}, failure)
    scrutiny = scrutinise(run, fluency, relevance)
    record["scrutiny"] = scrutiny
    write_json(folder / RECORD, record)
    return Vetted(name, folder, noise_apart(run, scrutiny), record)


def _found(bench: Bench, active: Approximation) -> list[str]:
    """What the measuring adds to a technique's own notes."""
    notes = []
    outside = {layer: share for layer, (share, _, _) in active.out_of_range("norm").items() if share > 0}
    if outside:
        layer = max(outside, key=lambda index: outside[index])
        notes.append(
            f"RMS norms: sums outside the 1/sqrt's range in {len(outside)} layers, most in layer {layer}: "
            f"{outside[layer]:.2%}"
        )
    if any(layer.experts for layer in bench.layers):
        notes.append("error at the down projections of stacked experts: not measured")
    return notes


def _exact(bench: Bench | None, settings: VetSettings, out: Path, progress: bool) -> Run:
    from trimtab.evaluation.runner import evaluate

    if bench is None:
        return read_exact(out / EXACT)
    run = evaluate(
        bench.loaded,
        list(settings.axes),
        out=out / EXACT,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    return write_exact(run, bench.fluency(settings.max_new_tokens), out / EXACT)


def _with_approx(model: str, name: str) -> str:
    return f"{model}{'&' if '?' in model else '?'}approx={name}"


def _finished(out: Path, name: str) -> bool:
    folder = out / naming.slug(name)
    return (folder / RECORD).is_file() and not _record(folder).get("failure") and (folder / SUMMARY).is_file()


def _record(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            "a record of the sweep cannot be read", seen=folder / RECORD, fix="delete that folder"
        ) from error
    return found


def _read(out: Path, name: str) -> Vetted:
    folder = out / naming.slug(name)
    record = _record(folder)
    return Vetted(name, folder, read_vetted(folder, record), record)


def _held(out: Path, settings: VetSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are in a folder (empty: none) and those wanted; a folder that holds a sweep with others is
    refused."""
    wanted = json.loads(json.dumps(asdict(settings), default=str))
    if settings.max_new_tokens < FINISHED_TOKENS:  # versions that did not ask undecided answers again had no such key
        wanted["undecided_max_new_tokens"] = FINISHED_TOKENS
    wanted["noise"] = NOISE_BY
    held = holding.read_settings(out / SETTINGS)
    known = held.keys() - {holding.MODEL, holding.FILES}
    if held and (differing := [key for key in sorted(known | wanted.keys()) if held.get(key) != wanted.get(key)]):
        raise UsageError(
            "that folder holds a sweep with other settings",
            seen=f"{out}: {', '.join(differing)}",
            fix="name another --out, or repeat its settings",
        )
    return held, wanted


def _check_model(out: Path, held: dict[str, Any], prints: dict[str, str], names: Sequence[str]) -> None:
    """Refuse to go on with numbers of another model: weights at one path change, and its name does not say so.

    Args:
        prints: the model's fingerprint; empty where nothing had to be loaded.
        names: approximations that are kept, each asked for itself: versions that stored no fingerprint mixed them.
    """
    whole = held.get(holding.MODEL) or holding.recorded(out / EXACT)
    if differs := holding.other_model(whole, prints):
        raise UsageError(
            "that folder holds a sweep of another model under this name",
            seen=f"{out}: {differs}",
            fix="name another --out, or remove that folder (weights in another precision are other weights)",
        )
    for folder in (out / naming.slug(name) for name in names):
        if differs := holding.other_model(holding.recorded(folder), prints or whole):
            raise UsageError(
                "an approximation in that folder was measured on another model under this name",
                seen=f"{folder}: {differs}",
                fix=f"remove {folder}: it is then measured again",
            )
