"""The renderer of a run: every program started once and kept warm, all formats side by side.

A failure of a renderer itself is "unavailable", with the reason in ``errors``; it never becomes a verdict on the text.
"""

from __future__ import annotations

import base64
import functools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal

from trimtab.structeval.formats import Format, find
from trimtab.structeval.formats.components import page_for
from trimtab.structeval.formats.jobs import CompileJob, Job, MermaidJob, PageJob, Rendered, WorkerJob
from trimtab.structeval.render import availability
from trimtab.structeval.render.browser import PAGE_SECONDS, Browser
from trimtab.structeval.render.launch import start_compiler, start_python
from trimtab.structeval.render.pages import Shot
from trimtab.structeval.render.workers import Pool, RenderError, WorkerFailed

SECONDS = {"tex": 45.0, "plot": 25.0, "typst": 15.0, "vega": 15.0, "svg": 10.0, "compile": 15.0}
AHEAD = 64  # items in flight or waiting to be handed out in order


class Renderer:
    """``with Renderer() as renderer``; may be used from several threads.

    ``workers``: of each kind, at most; default the processors, up to four. ``page_seconds``: when a page is given up.
    ``unsandboxed_python``: run Matplotlib scripts, which are programs, even where there is no bubblewrap; otherwise
    they are "unavailable" there.
    """

    def __init__(
        self, workers: int | None = None, *, page_seconds: float = PAGE_SECONDS, unsandboxed_python: bool = False
    ) -> None:
        self._page_seconds = page_seconds
        self._unsandboxed_python = unsandboxed_python
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._pools: dict[str, Pool] = {}
        self._browser: Browser | None = None
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._absent: dict[str, str | None] = {}

    def __enter__(self) -> Renderer:
        libraries = availability.find_libraries()
        # Worker processes end with the thread that started them, so the threads live as long as the renderer.
        self._threads = {
            name: ThreadPoolExecutor(count, f"trimtab-{name}")
            for name, count in (
                ("browser", self.workers + 1),
                ("tex", self.workers),
                ("plot", self.workers),
                ("quick", self.workers),
            )
        }
        self._pools = {
            kind: Pool(kind, functools.partial(start_python, kind), self.workers)
            for kind in ("typst", "vega", "svg", "tex", "plot")
        }
        if libraries is not None:
            self._pools["compile"] = Pool("JavaScript", functools.partial(start_compiler, libraries), self.workers)
        self._absent = {
            engine.name: f"{engine.missing}; {engine.fix}" if engine.missing else None
            for engine in availability.engines()
        }
        if not self._unsandboxed_python:
            self._absent["plot"] = self._absent["plot"] or availability.refused_python()
        self._browser = Browser(libraries, self.workers + 1, self._page_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for threads in self._threads.values():
            threads.shutdown(wait=True)
        for pool in self._pools.values():
            pool.close()
        if self._browser is not None:
            self._browser.close()

    def render(self, format_name: str, text: str) -> Rendered:
        """Draw one text. Raises UsageError for an unknown format."""
        return self._submit(find(format_name), text).result()

    def render_many(self, items: Iterable[tuple[str, str]]) -> Iterator[Rendered]:
        """Draw all, formats side by side; the results come in the order of ``items``, each as soon as it can."""
        waiting: deque[Future[Rendered]] = deque()
        for name, text in items:
            waiting.append(self._submit(find(name), text))
            while waiting and (len(waiting) >= AHEAD or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _submit(self, form: Format, text: str) -> Future[Rendered]:
        first = form.needs[0]
        lane = first if first in self._threads else "quick"
        return self._threads[lane].submit(self._one, form, text)

    def _one(self, form: Format, text: str) -> Rendered:
        began = time.monotonic()
        absent = next((why for why in map(self._absent.get, form.needs) if why), None)
        if absent:
            return Rendered(form.name, None, "", (absent,), False, "unavailable", 0.0)
        checked = form.check(text)
        if checked.ok is False:
            shot = Shot(None, "", (checked.error or "invalid",), False)
            return _finished(form.name, shot, began)
        try:
            return _finished(form.name, self._draw(form.plan(text)), began)
        except RenderError as error:
            return Rendered(form.name, None, "", (str(error),), False, "unavailable", time.monotonic() - began)

    def _draw(self, job: Job) -> Shot:
        if isinstance(job, WorkerJob):
            return self._draw_in_worker(job)
        if isinstance(job, MermaidJob):
            return self._with_browser().draw_mermaid(job.text)
        if isinstance(job, CompileJob):
            try:
                compiled = self._pools["compile"].call({"kind": job.kind, "text": job.text}, SECONDS["compile"])
            except WorkerFailed as error:
                return Shot(None, "", (f"the compiler failed: {error}",), False)
            if compiled["errors"]:
                return Shot(None, "", tuple(map(str, compiled["errors"])), False)
            job = page_for(job.kind, compiled)
        return self._with_browser().shoot(job)

    def _draw_in_worker(self, job: WorkerJob) -> Shot:
        try:
            answer = self._pools[job.kind].call({"text": job.text}, SECONDS[job.kind])
        except WorkerFailed as error:
            return Shot(None, "", (f"the {job.kind} renderer failed on this text: {error}",), False)
        return _shot(answer)

    def _with_browser(self) -> Browser:
        if self._browser is None:
            raise RenderError("the renderer is not open", fix="use it in a `with` statement")
        return self._browser


def _shot(answer: dict[str, Any]) -> Shot:
    png = None if answer["png"] is None else base64.b64decode(answer["png"])
    return Shot(png, str(answer["text"]), tuple(map(str, answer["errors"])), bool(answer["blank"]))


def _finished(name: str, shot: Shot, began: float) -> Rendered:
    whole: Literal["rendered", "blank"] = "blank" if shot.blank else "rendered"
    status: Literal["rendered", "failed", "blank"] = "failed" if shot.errors or shot.png is None else whole
    errors = shot.errors or (("the picture has one colour only",) if shot.blank else ())
    return Rendered(name, shot.png, shot.text, errors, shot.blank, status, time.monotonic() - began)


__all__ = ["Job", "PageJob", "Rendered", "Renderer"]
