"""One warm Chromium for all items: pages are reused, each item is an origin of its own and nothing reaches a network.

What holds a page in: bubblewrap around the whole browser (no network, no files), Chromium's own sandbox where it can
be had, a route that answers only the item's document and the local libraries, and a ``Content-Security-Policy:
sandbox`` header that leaves out modals, popups, downloads and top navigation. Service workers and cookies are off.
The pages themselves are in ``pages.py``.

Not covered: pages that need a network, and interaction (what a click would show is not shown).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from trimtab.structeval.formats.jobs import PageJob
from trimtab.structeval.render.launch import browser_command, kill_large_pages
from trimtab.structeval.render.pages import HEIGHT, WIDTH, Shot, Slot
from trimtab.structeval.render.workers import RenderError

T = TypeVar("T")
PAGE_SECONDS = 15.0
MAX_RESIDENT = 1_500_000_000  # bytes of one of Chromium's processes
LIBRARIES = ("react", "react-dom", "vue", "angular", "mermaid", "babel")


class Browser:
    """A Chromium in a thread of its own; its methods may be called from any thread."""

    def __init__(self, libraries: Path | None, slots: int, page_seconds: float = PAGE_SECONDS) -> None:
        self.page_seconds = page_seconds
        self._libraries = libraries
        self._slots_wanted = slots
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trimtab-browser", daemon=True)
        self._start_lock: asyncio.Lock | None = None
        self._driver: Any = None
        self._chromium: Any = None
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self._thread.start()

    def shoot(self, job: PageJob) -> Shot:
        """Show one document. Raises RenderError if the browser cannot be started."""
        return self._run(self._with_slot(lambda slot: slot.show(job)))

    def draw_mermaid(self, text: str) -> Shot:
        """Draw one diagram on a page that has Mermaid loaded."""
        return self._run(self._with_slot(lambda slot: slot.draw_mermaid(text)))

    def close(self) -> None:
        """End the browser and its thread."""
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _with_slot(self, use: Any) -> Shot:
        await self._started()
        slot = await self._free.get()
        try:
            shot: Shot = await use(slot)
            return shot
        finally:
            self._free.put_nowait(slot)

    async def _started(self) -> None:
        if self._start_lock is None:
            self._start_lock = asyncio.Lock()
        async with self._start_lock:
            if self._chromium is not None and self._chromium.is_connected():
                return
            await self._launch()

    async def _launch(self) -> None:
        from playwright.async_api import Error, async_playwright

        first = self._driver is None
        if first:
            self._driver = await async_playwright().start()
        script, arguments, own_sandbox = browser_command()
        try:
            self._chromium = await self._driver.chromium.launch(
                executable_path=script, chromium_sandbox=own_sandbox, args=arguments, timeout=60_000
            )
        except Error as error:
            fix = "run `trimtab doctor` and install what it names"
            raise RenderError("the browser does not start", seen=str(error)[:500], fix=fix) from error
        if first:
            for number in range(self._slots_wanted):
                self._free.put_nowait(Slot(self, number))
            self._watch = asyncio.ensure_future(self._watch_memory())

    async def new_context(self) -> Any:
        """A context with nothing in it."""
        await self._started()
        return await self._chromium.new_context(
            viewport={"width": WIDTH, "height": HEIGHT}, service_workers="block", accept_downloads=False, locale="en-US"
        )

    def library(self, name: str) -> bytes | None:
        """A local script by name; None where it is not installed."""
        if self._libraries is None or name not in LIBRARIES:
            return None
        path = self._libraries / f"{name}.js"
        return path.read_bytes() if path.is_file() else None

    async def _watch_memory(self) -> None:
        """Kill a page's process that grows beyond its share; the page then reports a crash."""
        while True:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(kill_large_pages, MAX_RESIDENT)

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._chromium is not None:
            await self._chromium.close()
        if self._driver is not None:
            await self._driver.stop()
