"""One page of the browser, used for one item after another: navigate, wait until it rests, measure, take the picture.

Each item is an origin of its own; the only addresses that are answered are the item's document and the local libraries.
A page that hangs or dies is thrown away with its context.

Not covered: starting the browser (``browser.py``), what runs in the page (``page_code.py``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from trimtab.structeval.formats.jobs import PageJob
from trimtab.structeval.render.page_code import MERMAID_PAGE, MERMAID_POLICY, NO_SCRIPTS, POLICY, settle_code
from trimtab.structeval.render.workers import RenderError
from trimtab.structeval.sandbox import patience

if TYPE_CHECKING:
    from trimtab.structeval.render.browser import Browser

T = TypeVar("T")
Step = Callable[[], Coroutine[Any, Any, T]]
READY_SECONDS = 120.0  # a new page, or loading Mermaid, on a busy machine
WIDTH, HEIGHT, MAX_HEIGHT = 1024, 768, 4_000
ITEMS_PER_PAGE = 200
CDN = (  # a well-known address of a library that is here anyway
    (re.compile(r"react-dom(@[\w.^~-]+)?(/|\.|$)"), "react-dom"),
    (re.compile(r"/react(@[\w.^~-]+)?(/|\.|$)"), "react"),
    (re.compile(r"@?babel[/-]?(standalone|core)?"), "babel"),
    (re.compile(r"/vue(@[\w.^~-]+)?(/dist/|\.global|\.min|\.js|$)"), "vue"),
    (re.compile(r"/mermaid(@[\w.^~-]+)?(/|\.|$)"), "mermaid"),
)


class Shot(NamedTuple):
    """What a page looked like. ``png`` None: it could not be pictured, see ``errors``."""

    png: bytes | None
    text: str
    errors: tuple[str, ...]
    blank: bool


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
        return await self._evaluate(settle_code(job.waits, job.only), world["executionContextId"])

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
