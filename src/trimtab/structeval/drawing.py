"""Pictures of what a model wrote: each document rendered once, kept by content hash, written as it comes.

Covered: one renderer for a whole run, started by the first document that needs it; a store on disk, so that an
interrupted run goes on; calls from several threads (inspect scores its samples side by side).
Not covered: how a format is drawn (``render``), scores (``run.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from trimtab.structeval import extraction, generations
from trimtab.structeval.generations import Generated

STORE = "pictures.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """What the renderer made of one document. ``png``: file with the picture, or None."""

    status: str
    text: str = ""
    errors: tuple[str, ...] = ()
    png: Path | None = None
    seconds: float = 0.0


class Drawing:
    """``with Drawing(store, workers) as drawing``; without ``store`` the pictures go to a folder that nobody removes.

    ``workers``: of the renderer, for each of its programs. ``unsandboxed_python``: see ``render.Renderer``.
    """

    def __init__(self, store: Path | None, workers: int, *, unsandboxed_python: bool = False) -> None:
        self.folder = store
        self._workers, self._unsandboxed_python = workers, unsandboxed_python
        self._lock = threading.RLock()
        self._known: dict[str, Drawn] | None = None
        self._renderer: Any = None
        self.started = 0  # renderers: one for a run, unless nothing had to be drawn

    def __enter__(self) -> Drawing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the renderer's programs, if there are any; a later call starts them again."""
        with self._lock:
            renderer, self._renderer = self._renderer, None
        if renderer is not None:
            renderer.__exit__(None, None, None)

    def draw_all(self, wanted: Sequence[Generated], progress: Callable[[int], Any] | None = None) -> dict[str, Drawn]:
        """By task: each generation's document, drawn; what the store has is not rendered again."""
        if not wanted:
            return {}
        folder, known = self._opened()
        codes = {one.task.id: extraction.strict(one.generation or "").text or "" for one in wanted}
        keys = {one.task.id: content_key(one.task.output_format, codes[one.task.id]) for one in wanted}
        todo = {keys[one.task.id]: (one.task.output_format, codes[one.task.id]) for one in wanted}
        with self._lock:
            found = {key: known[key] for key in todo if key in known}
        if progress is not None:
            progress(sum(key in found for key in keys.values()))
        for key, row in self._render({key: job for key, job in todo.items() if key not in found}, folder):
            found[key] = _drawn_from(row, folder)
            self._keep(row, found[key], folder)
            if progress is not None:
                progress(sum(value == key for value in keys.values()))
        return {task_id: found[key] for task_id, key in keys.items()}

    def _opened(self) -> tuple[Path, dict[str, Drawn]]:
        with self._lock:
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix="trimtab-structeval-"))
            folder = self.folder
            folder.mkdir(parents=True, exist_ok=True)
            if self._known is None:
                rows = generations.read_lines(folder / STORE)
                self._known = {row["key"]: _drawn_from(row, folder) for row in rows}
            return folder, self._known

    def _keep(self, row: Row, drawn: Drawn, folder: Path) -> None:
        if row["status"] == "unavailable":  # once the renderer is installed, it is asked again
            return
        with self._lock:
            if self._known is not None:
                self._known[row["key"]] = drawn
            with generations.append(folder / STORE) as stream:
                generations.write_line(stream, row)

    def _render(self, missing: dict[str, tuple[str, str]], folder: Path) -> Iterator[tuple[str, Row]]:
        for key in (key for key, (_, code) in missing.items() if not code):
            yield key, {"key": key, "status": "failed", "errors": ["the answer is empty"], "text": "", "png": None}
        jobs = [(key, job) for key, job in missing.items() if job[1]]
        if not jobs:
            return
        try:
            renderer = self._started_renderer()
        except ImportError as error:
            for key, _ in jobs:
                why = [f"no renderer: {error}"]
                yield key, {"key": key, "status": "unavailable", "errors": why, "text": "", "png": None}
            return
        for (key, _), made in zip(jobs, renderer.render_many([job for _, job in jobs]), strict=True):
            yield key, _row(key, made, folder)

    def _started_renderer(self) -> Any:
        with self._lock:
            if self._renderer is None:
                render = importlib.import_module("trimtab.structeval.render")
                renderer = render.Renderer(workers=self._workers, unsandboxed_python=self._unsandboxed_python)
                self._renderer = renderer.__enter__()
                self.started += 1
            return self._renderer


def content_key(output_format: str, code: str) -> str:
    """Hash of what decides a picture: format, document, renderer versions."""
    text = "\0".join((output_format, code, renderer_version()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def renderer_version() -> str:
    """Versions of the renderers, as ``render`` reports them; "none" where it is not installed."""
    try:
        module = importlib.import_module("trimtab.structeval.render")
    except ImportError:
        return "none"
    version = getattr(module, "version", None)
    return str(version()) if callable(version) else "1"


def _row(key: str, made: Any, folder: Path) -> Row:
    """What the store keeps of a ``Rendered``; its picture goes to a file."""
    name = f"{key[:32]}.png" if made.png else None
    if name:
        partial = folder / f"{name}.{threading.get_ident()}.partial"
        partial.write_bytes(made.png)
        partial.replace(folder / name)
    return {
        "key": key,
        "format": made.format,
        "status": made.status,
        "errors": [str(error)[:500] for error in made.errors[:5]],
        "text": made.text[:20_000],
        "png": name,
        "seconds": made.seconds,
    }


def _drawn_from(row: Row, folder: Path) -> Drawn:
    png = folder / Path(str(row["png"])).name if row.get("png") else None
    if png is not None and not png.is_file():
        png = None
    return Drawn(row["status"], row.get("text", ""), tuple(row.get("errors", ())), png, row.get("seconds", 0.0))
