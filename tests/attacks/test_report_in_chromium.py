"""The page in a real browser, driven by Playwright: nothing foreign runs or leaves, thousands of items stay quick.

Every payload tries to set a flag on the window or to open a dialog. Requests, console messages and page errors are
recorded; the only request allowed is the one for the page itself.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.comparison import Axis, Item, Run, compare
from trimtab.reports import to_html

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: trimtab[structeval]")
expect = playwright.expect

FLAG = "window.owned=1"
HOSTILE = [
    f"<script>{FLAG};alert(1)</script>",
    f"</script><script>{FLAG}</script>",
    f"</noscript><script>{FLAG}</script><noscript>",
    f"<noscript><p title='</noscript><img src=x onerror={FLAG}>'>",
    f"</template><img src=x onerror={FLAG}>",
    f'"><img src="https://example.invalid/x.png" onerror="{FLAG}">',
    f"<svg onload={FLAG}><style><img src=x onerror={FLAG}></style></svg>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror={FLAG}&gt;'>",
    f'<a href="javascript:{FLAG}">open</a> javascript:{FLAG}',
    f"<iframe src='javascript:parent.{FLAG}'></iframe><object data='//example.invalid/o'></object>",
    f"<form action=//example.invalid><button autofocus onfocus={FLAG}>x</button></form>",
    "<link rel=stylesheet href=//example.invalid/x.css><style>@import '//example.invalid/y.css'</style>",
    '<meta http-equiv="refresh" content="0;url=https://example.invalid/">',
    f"]]><script>{FLAG}</script><![CDATA[",
    f"&lt;img src=x onerror={FLAG}&gt; &amp;lt;script&amp;gt;{FLAG}&amp;lt;/script&amp;gt;",
    "\u202egnp.\u2066exe\u2069 \u200b\x00\x1b]8;;https://example.invalid\x07 \ud800 \U000e0041",
    "$& $` $' \\u003cscript\\u003e ${window.owned=1}",
]
MEGABYTE = f"<img src=x onerror={FLAG}>" + "A" * 1_000_000


def chromium_path() -> str | None:
    """Chromium of the system, else Playwright's own; None where neither is there."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
    return str(own) if own.is_file() else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium_path()
    if path is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page that was opened, with everything that happened in it."""

    def __init__(self, browser: Any, html: str, file: Path, width: int = 1280, **options: Any) -> None:
        file.write_text(html, encoding="utf-8")
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.context.on("page", lambda page: self.complaints.append(f"opened {page.url}"))
        start = time.perf_counter()
        self.page.goto(file.as_uri(), wait_until="load")
        self.seconds = time.perf_counter() - start
        self.address = file.as_uri()

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def quiet(self) -> bool:
        """Nothing ran, nothing was asked for, nothing was complained about."""
        assert self.page.evaluate("window.owned") is None
        assert self.requests == [self.address]
        assert self.complaints == []
        return True


def sides(texts: list[str], base_word: str = "refused", word: str = "harmful") -> tuple[Run, Run]:
    """Two runs whose every field carries a text: id, category, prompt, answer, verdict, names, settings."""
    runs = []
    for name, verdict, value in (("base", base_word, 0.0), ("candidate", word, 1.0)):
        items = tuple(
            Item(f"{place} {text[:50]}", text[:120], f"prompt {place} {text}", f"{name} {text}", verdict, value)
            for place, text in enumerate(texts)
        )
        axis = Axis("compliance", texts[0][:90], "binary", True, texts[0][:60], texts[0][:60], items)
        template = "\n".join([name, *[text[:300] for text in texts]])
        prints = {"chat_template": name, "generation": f'{{"stop": "{name}"}}', texts[0][:40]: texts[0][:90] + name}
        runs.append(Run(f"{name} {texts[0][:80]}", {"compliance": axis}, prints, texts[0][:40],
                        {"chat_template": template}))  # fmt: skip
    return runs[0], runs[1]


def hostile_page(texts: list[str]) -> str:
    base, candidate = sides(texts)
    return to_html([compare(base, candidate)], title=f"Report {texts[0][:100]}")


def test_hostile_texts_do_nothing_and_are_readable(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, hostile_page(HOSTILE), tmp_path / "page.html")
    shown = visit.page.locator("#list article")
    assert shown.count() == len(HOSTILE)
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    visit.page.wait_for_timeout(200)
    text = visit.page.locator("#list").text_content()
    for one in (HOSTILE[0], HOSTILE[2], HOSTILE[4], HOSTILE[13], HOSTILE[14]):
        assert one in text  # what the model wrote, letter for letter
    assert "\u202e" not in text
    assert "⟨U+202E⟩" in text
    assert visit.quiet()


def test_searching_and_filtering_hostile_texts_runs_nothing(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, hostile_page(HOSTILE), tmp_path / "page.html")
    visit.page.fill("#find", '"><img src="https://example.invalid')
    visit.page.wait_for_timeout(300)
    assert visit.page.locator("#list article").count() == 1
    visit.page.fill("#find", "article role=")  # our own markup is not text
    visit.page.wait_for_timeout(300)
    assert visit.page.locator("#list article").count() == 0
    assert visit.page.inner_text("#count") == "0 items"
    visit.page.fill("#find", "")
    for select in ("#by-category", "#by-axis", "#by-direction"):
        visit.page.select_option(select, index=1)
        visit.page.wait_for_timeout(50)
    assert visit.page.locator("#list article").count() >= 1
    assert visit.quiet()


@pytest.mark.parametrize("scripts", [True, False], ids=["with-script", "without-script"])
def test_an_answer_of_a_megabyte_is_cut_and_stays_inert(browser: Any, tmp_path: Path, scripts: bool) -> None:
    page = hostile_page([MEGABYTE, "short"])
    assert len(page.encode()) < 600_000
    visit = Visit(browser, page, tmp_path / "page.html", java_script_enabled=scripts)
    assert visit.seconds < 5.0
    assert visit.page.locator("#list article").count() == 2
    assert "characters are not shown" in (visit.page.locator("#list").text_content() or "")
    assert visit.requests == [visit.address]
    if scripts:
        assert visit.quiet()


def test_without_scripts_every_item_is_shown_and_no_dead_control(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, hostile_page(HOSTILE), tmp_path / "page.html", java_script_enabled=False)
    assert visit.page.locator("#list article").count() == len(HOSTILE)
    assert visit.page.locator("#list img, #list script, #list iframe, #list a, #list form").count() == 0
    assert not visit.page.locator("form.filters").is_visible()
    assert visit.requests == [visit.address]


def test_nothing_of_an_item_comes_to_life_in_the_dom(browser: Any, tmp_path: Path) -> None:
    """Rows are markup that the script reads again: only our own elements, and no attribute with a foreign text."""
    visit = Visit(browser, hostile_page(HOSTILE), tmp_path / "page.html")
    found = visit.page.evaluate(
        "[...document.querySelectorAll('#list *')]"
        ".map(e => [e.localName, ...[...e.attributes].map(a => a.name + '=' + a.value)])"
    )
    tags = {row[0] for row in found}
    assert tags <= {"article", "p", "span", "bdi", "code", "div", "section", "h3", "details", "summary"}
    attributes = {attribute for row in found for attribute in row[1:]}
    known = r"(class=[a-z -]+|role=listitem|dir=auto|aria-hidden=true)"
    assert all(re.fullmatch(known, attribute) for attribute in attributes)
    assert visit.quiet()


def test_the_policy_stops_scripts_even_if_escaping_failed(browser: Any, tmp_path: Path) -> None:
    raw = f"<script>{FLAG}</script><img src=x onerror='{FLAG}'>"
    page = hostile_page(["harmless"]).replace("<article class", raw + "<article class", 1)
    open_page = re.sub(r"<meta http-equiv=[^>]*>", "", page, count=1)
    guarded = Visit(browser, page.replace("<h2", raw + "<h2", 1), tmp_path / "guarded.html")
    assert guarded.page.evaluate("window.owned") is None
    assert any("Content Security Policy" in text for text in guarded.complaints)
    bare = Visit(browser, open_page.replace("<h2", raw + "<h2", 1), tmp_path / "bare.html")
    assert bare.page.evaluate("window.owned") == 1  # the payload does run where nothing stops it


@pytest.fixture(scope="module")
def large() -> str:
    """Three axes of 3,000 items, every one of them changed."""
    words = ("water", "station", "answers", "several", "careful", "questions", "garden", "recipes", "engines") * 2
    runs = []
    for name, value in (("base", 0.0), ("candidate", 1.0)):
        axes = {}
        for kind in ("compliance", "over_refusal", "jailbreak:prefill"):
            items = tuple(
                Item(f"{kind}-{place:04d}", f"group {place % 8}", f"prompt {place} {words[place % 9]}",
                     f"{name} {place} " + " ".join(words * 5), "yes" if value else "no", value)
                for place in range(3000)
            )  # fmt: skip
            axes[kind] = Axis(kind, f"Axis {kind}", "binary", True, "rules@1", "set@sha256:ab", items)
        runs.append(Run(name, axes, {"weights": name}, "2026-01-01T00:00:00"))
    return to_html([compare(*runs)], title="Nine thousand")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nine_thousand_changed_items_stay_quick(
    browser: Any, large: str, tmp_path: Path, width: int, scheme: str
) -> None:
    visit = Visit(browser, large, tmp_path / "page.html", width, color_scheme=scheme)
    assert visit.seconds < 6.0  # 1.4 s on two busy cores; the bound leaves room for a loaded machine
    assert visit.page.locator("#list article").count() == 40
    assert visit.page.evaluate("document.querySelectorAll('*').length") < 5_000
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    visit.page.click("#more")
    assert visit.page.locator("#list article").count() == 80
    visit.page.fill("#find", "prompt 2999 compliance")
    expect(visit.page.locator("#count")).to_have_text("1 item", timeout=10_000)
    visit.page.fill("#find", "")
    visit.page.select_option("#by-axis", index=2)
    expect(visit.page.locator("#count")).to_have_text("Showing 40 of 3,000 items", timeout=10_000)
    assert visit.quiet()


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_no_width_makes_the_page_scroll_sideways(browser: Any, tmp_path: Path, width: int) -> None:
    long = ["W" * 300, "a/" * 200 + "name", *HOSTILE[:3]]
    visit = Visit(browser, hostile_page(long), tmp_path / "page.html", width)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    assert visit.quiet()
