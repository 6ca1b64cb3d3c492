"""One warm Chromium for all items: pages are reused, each item is an origin of its own and nothing reaches a network.

What holds a page in: bubblewrap around the whole browser (no network, no files), Chromium's own sandbox where it can
be had, a route that answers only the item's document and the local libraries, and a ``Content-Security-Policy:
sandbox`` header that leaves out modals, popups, downloads and top navigation. Service workers and cookies are off.
A page that hangs or dies is thrown away with its context.

Not covered: pages that need a network, and interaction (what a click would show is not shown).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trimtab.structeval.formats.jobs import PageJob
from trimtab.structeval.render.launch import browser_command, kill_large_pages
from trimtab.structeval.render.workers import RenderError
from trimtab.structeval.sandbox import patience

T = TypeVar("T")
Step = Callable[[], Coroutine[Any, Any, T]]
PAGE_SECONDS = 15.0
READY_SECONDS = 120.0  # a new page, or loading Mermaid, on a busy machine
WIDTH, HEIGHT, MAX_HEIGHT = 1024, 768, 4_000
MAX_TEXT = 200_000
MAX_RESIDENT = 1_500_000_000  # bytes of one of Chromium's processes
ITEMS_PER_PAGE = 200
POLICY = "sandbox allow-scripts allow-same-origin allow-forms; "
NO_SCRIPTS = "script-src 'none'; "
LIBRARIES = ("react", "react-dom", "vue", "angular", "mermaid", "babel")
CDN = (  # a well-known address of a library that is here anyway
    (re.compile(r"react-dom(@[\w.^~-]+)?(/|\.|$)"), "react-dom"),
    (re.compile(r"/react(@[\w.^~-]+)?(/|\.|$)"), "react"),
    (re.compile(r"@?babel[/-]?(standalone|core)?"), "babel"),
    (re.compile(r"/vue(@[\w.^~-]+)?(/dist/|\.global|\.min|\.js|$)"), "vue"),
    (re.compile(r"/mermaid(@[\w.^~-]+)?(/|\.|$)"), "mermaid"),
)
# Runs in a world of its own, where the page cannot change what the functions are. Waits until the page is at rest:
# its own flag if it has one, fonts, no change of the document for 50 ms (400 ms at most), two frames; then measures.
SETTLE = """(async (flag, only) => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const root = document.documentElement;
  while (flag && !root.hasAttribute("data-trimtab-done")) await pause(5);
  await Promise.race([document.fonts.ready, pause(1000)]);
  let last = performance.now();
  const began = last;
  const watch = new MutationObserver(() => { last = performance.now(); });
  watch.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  await pause(0);
  if (document.scripts.length) while (performance.now() - last < 50 && performance.now() - began < 400) await pause(10);
  watch.disconnect();
  for (const one of document.getAnimations()) { try { one.finish(); } catch { /* an endless one stays */ } }
  await Promise.race([new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))), pause(100)]);
  const body = document.body;
  const box = only ? document.querySelector(only)?.getBoundingClientRect() : null;
  return JSON.stringify({
    exact: Boolean(box),
    text: ((only ? document.querySelector(only)?.textContent : body?.innerText) ?? "").slice(0, MAX_TEXT),
    height: Math.ceil(box ? box.height : Math.max(root.scrollHeight, body?.scrollHeight ?? 0)),
    width: Math.ceil(box ? box.width : Math.max(root.scrollWidth, body?.scrollWidth ?? 0)),
    mounted: (document.getElementById("root")?.childNodes.length ?? 1) > 0,
  });
})(FLAG, ONLY)"""


class Shot(NamedTuple):
    """What a page looked like. ``png`` None: it could not be pictured, see ``errors``."""

    png: bytes | None
    text: str
    errors: tuple[str, ...]
    blank: bool


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


class Slot:
    """A page that is used for one item after another."""

    def __init__(self, browser: Browser, number: int) -> None:
        self._browser, self._number = browser, number
        self._context: Any = None
        self._page: Any = None
        self._cdp: Any = None
        self._used = 0
        self._address, self._job = "", PageJob("")
        self._errors: list[str] = []
        self._mermaid = False

    async def show(self, job: PageJob) -> Shot:
        """Navigate, wait until it rests, take the picture."""
        return await self._guarded(self._ready, lambda: self._show(job))

    async def draw_mermaid(self, text: str) -> Shot:
        """Draw on the page that has Mermaid; load it first if another item had the page."""
        return await self._guarded(self._load_mermaid, lambda: self._draw_mermaid(text))

    async def _guarded(self, prepare: Step[None], work: Step[Shot]) -> Shot:
        """``prepare`` has nothing to do with the text: what goes wrong there is ours, and has more time."""
        from playwright.async_api import Error

        try:
            await asyncio.wait_for(prepare(), READY_SECONDS)
        except (TimeoutError, Error) as error:
            await self._drop()
            raise RenderError("the browser gives no page", seen=_first_line(str(error)), fix="try again") from error
        seconds = self._browser.page_seconds * patience()
        try:
            return await asyncio.wait_for(work(), seconds)
        except TimeoutError:
            trouble = f"the page was stopped after {seconds:.0f} s"
        except Error as error:
            trouble = f"the page failed: {_first_line(str(error))}"
        errors = (*self._errors[:20], trouble)
        await self._drop()
        return Shot(None, "", errors, False)

    async def _show(self, job: PageJob) -> Shot:
        await self._navigate(job)
        measured = await self._settle(job)
        png = await self._picture(measured, exact=bool(measured["exact"]))
        errors = list(dict.fromkeys(self._errors[:20]))
        if job.must_mount and not measured["mounted"] and not errors:
            errors.append("nothing was mounted")
        return Shot(png, str(measured["text"]), tuple(errors), is_blank(png))

    async def _ready(self) -> None:
        if self._page is not None and self._used < ITEMS_PER_PAGE and not self._page.is_closed():
            return
        await self._drop()
        self._context = await self._browser.new_context()
        self._page = await self._context.new_page()
        self._context.on("page", lambda page: asyncio.ensure_future(_close_quietly(page)))
        self._page.on("pageerror", lambda error: self._errors.append(str(error)[:500]))
        self._page.on("crash", lambda _page: self._errors.append("the page crashed or took too much memory"))
        await self._page.route("**/*", self._answer)
        self._cdp = await self._context.new_cdp_session(self._page)
        await self._cdp.send("Page.enable")
        await self._cdp.send("Emulation.setDocumentCookieDisabled", {"disabled": True})

    async def _navigate(self, job: PageJob) -> None:
        self._used += 1
        self._mermaid = False
        self._job = job
        # One site for each slot, so that Chromium keeps its process; one origin for each item, so that storage is new.
        self._address = f"https://i{time.monotonic_ns()}.slot{self._number}.invalid/"
        self._errors.clear()
        await self._page.goto(self._address, wait_until="load", timeout=READY_SECONDS * 1_000)

    async def _settle(self, job: PageJob) -> dict[str, Any]:
        tree = await self._cdp.send("Page.getFrameTree")
        frame = tree["frameTree"]["frame"]["id"]
        world = await self._cdp.send("Page.createIsolatedWorld", {"frameId": frame, "worldName": "trimtab"})
        code = (
            SETTLE.replace("FLAG", json.dumps(job.waits))
            .replace("ONLY", json.dumps(job.only))
            .replace("MAX_TEXT", str(MAX_TEXT))
        )
        return await self._evaluate(code, world["executionContextId"])

    async def _evaluate(self, code: str, world: int | None = None) -> dict[str, Any]:
        options = {"expression": code, "awaitPromise": True, "returnByValue": True}
        if world is not None:
            options["contextId"] = world
        got = await self._cdp.send("Runtime.evaluate", options)
        if "exceptionDetails" in got:
            detail = got["exceptionDetails"]
            return {"failure": str(detail.get("exception", {}).get("description") or detail.get("text"))[:500]}
        found: dict[str, Any] = json.loads(got["result"]["value"])
        return found

    async def _picture(self, measured: dict[str, Any], *, exact: bool = False) -> bytes:
        options: dict[str, Any] = {"format": "png", "optimizeForSpeed": True}
        height, width = min(measured["height"], MAX_HEIGHT), min(max(measured["width"], 1), 2 * WIDTH)
        if exact or height > HEIGHT or width > WIDTH:
            width = width if exact else max(width, WIDTH)
            height = max(height, 1) if exact else max(height, HEIGHT)
            options |= {"captureBeyondViewport": True}
            options["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = await self._cdp.send("Page.captureScreenshot", options)
        return base64.b64decode(shot["data"])

    async def _load_mermaid(self) -> None:
        await self._ready()
        if not self._mermaid:
            await self._navigate(PageJob(MERMAID_PAGE))
            if self._errors:
                raise RenderError("Mermaid does not load", seen=self._errors[0], fix="run `trimtab doctor`")
            self._mermaid = True

    async def _draw_mermaid(self, text: str) -> Shot:
        self._used += 1
        self._errors.clear()
        drawn = await self._evaluate(f"trimtabDraw({json.dumps(text)})")
        if "failure" in drawn:
            return Shot(None, "", (str(drawn["failure"]),), False)
        png = await self._picture(drawn, exact=True)
        return Shot(png, str(drawn["text"]), tuple(self._errors), is_blank(png))

    async def _answer(self, route: Any) -> None:
        from playwright.async_api import Error

        request, address = route.request, route.request.url
        # An error here means that the page went away meanwhile: then nobody waits for the answer.
        with contextlib.suppress(Error):
            if address == self._address and request.is_navigation_request():
                policy = MERMAID_POLICY if self._job.html is MERMAID_PAGE else POLICY
                policy += "" if self._job.scripts else NO_SCRIPTS
                headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": policy}
                await route.fulfill(status=200, headers=headers, body=self._job.html)
            elif (library := self._library_for(address)) is not None and request.resource_type == "script":
                headers = {"content-type": "text/javascript; charset=utf-8", "access-control-allow-origin": "*"}
                await route.fulfill(status=200, headers=headers, body=library)
            elif request.is_navigation_request():
                await route.abort("aborted")  # keeps the document that is shown
            else:
                await route.abort("blockedbyclient")

    def _library_for(self, address: str) -> bytes | None:
        local = re.fullmatch(rf"{re.escape(self._address)}trimtab/([a-z-]+)\.js", address)
        if local:
            return self._browser.library(local.group(1))
        name = next((name for pattern, name in CDN if pattern.search(address)), None)
        return self._browser.library(name) if name else None

    async def _drop(self) -> None:
        """Throw the page away, with everything that it may have stored."""
        context, self._context, self._page, self._cdp, self._used = self._context, None, None, None, 0
        self._mermaid = False
        if context is not None:
            await _close_quietly(context)


async def _close_quietly(what: Any) -> None:
    """Close a page or context that may be hanging or gone; the browser's own end cleans up what stays."""
    from playwright.async_api import Error

    with contextlib.suppress(Error, TimeoutError):
        await asyncio.wait_for(what.close(), 5)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "no reason given"


def is_blank(png: bytes) -> bool:
    """Whether a screenshot has one colour only."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        extremes: Any = image.convert("RGB").getextrema()
    return all(low == high for low, high in extremes)


MERMAID_POLICY = (
    "sandbox allow-scripts allow-same-origin; default-src 'none'; script-src 'self' 'nonce-trimtab'; "
    "style-src 'unsafe-inline'; img-src data:; font-src data:; "
)
MERMAID_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>diagram</title>
<style>body { margin: 0; background: white } #drawing { display: inline-block; padding: 16px; min-width: 8px }
#drawing svg { max-width: 1600px }</style>
<body><div id="drawing"></div><script src="/trimtab/mermaid.js"></script><script nonce="trimtab">
mermaid.initialize({startOnLoad: false, securityLevel: "strict", suppressErrorRendering: true, maxTextSize: 50000});
let number = 0;
globalThis.trimtabDraw = async (text) => {
  const place = document.getElementById("drawing");
  place.replaceChildren();
  await mermaid.parse(text);
  const drawn = await mermaid.render("d" + (++number), text);
  place.innerHTML = drawn.svg;
  for (const rest of document.querySelectorAll("body > div:not(#drawing)")) rest.remove();
  const picture = place.querySelector("svg");
  const size = picture.viewBox?.baseVal;
  if (size && size.width) picture.style.width = Math.min(size.width, 1600) + "px";
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const box = place.getBoundingClientRect();
  const words = [...picture.querySelectorAll("text, foreignObject")]
    .filter((one) => !one.parentElement.closest("foreignObject")).map((one) => one.textContent.trim()).filter(Boolean);
  const said = words.join("\\n").slice(0, 200000);
  return JSON.stringify({text: said, width: Math.ceil(box.width), height: Math.ceil(box.height)});
};
</script></body></html>"""
