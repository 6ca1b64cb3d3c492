"""Run the geometry of one model into a folder: measurements as JSON, a Markdown table, pictures; resumes by part.

Covered: anchors and rows, order of the parts, what is kept when a run is repeated. Not covered: the measurements
themselves (``measure.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.anchors import SafetyAnchors
from trimtab.errors import UsageError
from trimtab.geometry import measure
from trimtab.geometry.measure import GeometrySettings, Subjects
from trimtab.geometry.rows import bundled_rows, read_rows, tokenise_rows
from trimtab.json_files import read_json
from trimtab.models import LoadedModel, fingerprint
from trimtab.tuning.distill import distill
from trimtab.tuning.guard import quiet
from trimtab.tuning.pools import reader_for, tokenise


@dataclass(frozen=True)
class Geometry:
    """A measured geometry. ``document`` is what ``geometry.json`` holds; ``pictures`` the files beside it."""

    document: dict[str, Any]
    pictures: list[Path]


def run_geometry(
    loaded: LoadedModel,
    out: Path,
    settings: GeometrySettings,
    data_file: Path | None = None,
    anchors: SafetyAnchors | None = None,
) -> Geometry:
    """Measure ``loaded`` into ``out``; a part that is there already (same model, data, settings) is not repeated.

    Args:
        anchors: only the side to refuse is used; missing replies are the model's own. None: the bundled pool.

    Raises:
        UsageError: when ``out`` holds the geometry of something else.
        DataError: when a file in ``out`` cannot be read.
    """
    from trimtab.geometry.charts import draw
    from trimtab.geometry.table import to_markdown

    rows = read_rows(data_file) if data_file else bundled_rows(settings.seed)
    task = tokenise_rows(loaded, rows[: max(64, 4 * settings.batch, 2 * settings.samples)])
    header = {
        "model": loaded.name,
        "weights": fingerprint(loaded)["weights"],
        "data": str(data_file) if data_file else "bundled routing task",
        "data_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16],
        "settings": asdict(settings),
    }
    _claim(out, header)
    subjects, reply_origin = _subjects(loaded, task, settings, anchors)
    reader = reader_for(loaded, loaded.model)
    parts: dict[str, Callable[[], Any]] = {
        "spectra": lambda: measure.measure_spectra(reader, subjects, settings.samples),
        "overlaps": lambda: measure.measure_overlaps(reader, subjects, settings),
        "cosines": lambda: measure.measure_cosines(reader, subjects, settings),
        "trace": lambda: measure.trace(reader, subjects, settings) if settings.steps else [],  # last: it trains
    }
    document: dict[str, Any] = {**header, "anchors": reply_origin, "torch": torch.__version__}
    for name, make in parts.items():
        document[name] = _part(out / f"{name}.json", make)
    _write(out / "geometry.json", json.dumps(document, indent=1))
    _write(out / "geometry.md", to_markdown(document))
    return Geometry(document=document, pictures=draw(document, out))


def _subjects(
    loaded: LoadedModel, task: list[Any], settings: GeometrySettings, anchors: SafetyAnchors | None
) -> tuple[Subjects, str]:
    """The published sample, enough refusals that the model writes itself, and the task rows."""
    wanted = settings.samples + 4
    pool = anchors if anchors is not None else SafetyAnchors.bundled(min(168, 2 * wanted))
    pool = SafetyAnchors(anchors=pool.side("refuse"), origin=pool.origin, system=pool.system)
    with quiet(loaded.model), torch.random.fork_rng():
        pool = distill(loaded, pool)
    if len(pool.anchors) < wanted:
        raise UsageError(
            "too few refusals to compare samples with a batch",
            seen=f"{len(pool.anchors)} of {wanted}",
            fix="lower --samples, or give --anchors with replies",
        )
    refuse = [tokenise(loaded, anchor, pool.system, None) for anchor in pool.anchors[:wanted]]
    published = [tokenise(loaded, anchor, None, None) for anchor in SafetyAnchors.published().anchors]
    return Subjects(published=published, refuse=refuse, task=task), pool.origin


def _claim(out: Path, header: dict[str, Any]) -> None:
    record = out / "of.json"
    fix = "name another --out"
    if record.is_file() and read_json(record, "that folder's record cannot be read", fix) != header:
        raise UsageError("that folder holds the geometry of another model, data or settings", seen=out, fix=fix)
    out.mkdir(parents=True, exist_ok=True)
    _write(record, json.dumps(header, indent=1))


def _part(path: Path, make: Callable[[], Any]) -> Any:
    if path.is_file():
        return read_json(path, "a finished part cannot be read", "remove that file; it is then measured again")
    value = make()
    _write(path, json.dumps(value))
    return value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
