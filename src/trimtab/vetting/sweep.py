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
from trimtab.vetting.plan import BUNDLED_TEXT
from trimtab.vetting.scrutiny import (
    INNOCENT_NOISE,
    NOISE_BY,
    exact_noise,
    innocent_noise,
    noise_apart,
    noise_in,
    read_exact,
    read_innocents,
    read_vetted,
    scrutinise,
    write_exact,
    write_json,
)
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
    to_do = bool(missing or _half_read(out, kept)) or not (out / EXACT / SUMMARY).is_file()
    loaded = load(settings.model) if to_do or (files and files != held.get(holding.FILES)) else None
    _check_layers(loaded, missing)
    prints = fingerprint(loaded) if loaded is not None else {}
    _check_model(out, held, prints, kept)
    if prints:
        write_json(out / SETTINGS, {**wanted, holding.MODEL: prints, holding.FILES: files})
    bench = Bench(loaded) if loaded is not None and to_do else None
    base_run = _exact(bench, settings, out, progress)
    if bench is not None:
        _read_innocents(out, kept, bench, settings)
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
    record |= {"scrutiny": scrutiny, INNOCENT_NOISE: innocent_noise(run, fluency)}
    write_json(folder / RECORD, record)
    return Vetted(name, folder, noise_apart(run, noise_in(record)), record)


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


def _half_read(out: Path, names: Sequence[str]) -> bool:
    """Whether the exact model's answers to innocent prompts were read for noise and an approximation's, measured by an
    old version, were not: the two could not be compared."""
    read = any(name.partition(":")[0] == "over_refusal" for name in exact_noise(out / EXACT))
    return read and any(INNOCENT_NOISE not in _record(out / naming.slug(name)) for name in names)


def _read_innocents(out: Path, names: Sequence[str], bench: Bench, settings: VetSettings) -> None:
    """Complete records of old versions; the answers are in their logs."""
    for folder in (out / naming.slug(name) for name in names):
        record = _record(folder)
        if INNOCENT_NOISE not in record:
            completed = read_innocents(folder, record, bench.fluency(settings.max_new_tokens))
            write_json(folder / RECORD, completed)


def _held(out: Path, settings: VetSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are in a folder (empty: none) and those wanted; a folder that holds a sweep with others is
    refused. Files of prompts are told by what is in them: the folder may be moved, or its path be written otherwise."""
    wanted = json.loads(json.dumps(asdict(settings), default=str))
    for axis in wanted["axes"]:
        axis["path"] = _content(axis, out)
    if settings.max_new_tokens < FINISHED_TOKENS:  # versions that did not ask undecided answers again had no such key
        wanted["undecided_max_new_tokens"] = FINISHED_TOKENS
    wanted["noise"] = NOISE_BY
    held = holding.read_settings(out / SETTINGS)
    known = {key: value for key, value in held.items() if key not in (holding.MODEL, holding.FILES)}
    if held and (differing := holding.differences(_told_apart(known, out), _told_apart(wanted, out))):
        raise UsageError(
            "that folder holds a sweep with other settings",
            seen=f"{out}: {differing}",
            fix="name another --out, or repeat its settings",
        )
    return held, wanted


def _told_apart(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Settings with one name for each value of each axis, so that what differs can be told without the rest."""
    found = {key: value for key, value in settings.items() if key != "axes"}
    for place, axis in enumerate(settings.get("axes") or (), 1):
        told = {**axis, "path": _content(axis, out)}
        found |= {f"axis {place} {key}": value for key, value in told.items() if value is not None}
    return found


def _content(axis: dict[str, Any], out: Path) -> str | None:
    """What an axis' file holds, from its path; old versions wrote that down. A path where nothing is stays itself."""
    path = axis.get("path")
    if not path or path.startswith(holding.CONTENT):
        return path
    place = Path(path)
    if not place.exists() and axis.get("dataset") == BUNDLED_TEXT:  # written into each folder: that of a moved one
        place = out / place.name
    return holding.content_of(place) or str(path)


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
