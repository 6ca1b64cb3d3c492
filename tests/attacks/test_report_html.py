"""Hostile prompts, answers, categories and names must come out of the HTML report inert.

Everything in a report except the judge's numbers was written by a model, a data set or a stranger. The page is parsed
and must hold no element, attribute or link beyond its own; where Chromium is installed it is also opened, and a marker
that every payload tries to set must stay unset.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trimtab.comparison import Axis, Item, Run, compare
from trimtab.reports import to_html, to_json, to_markdown

MARK = "document.documentElement.setAttribute('data-owned','1')"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f"</script><script>{MARK}</script>",
    f"</style><script>{MARK}</script>",
    f"</title><script>{MARK}</script>",
    f'"><img src=x onerror="{MARK}">',
    f"'><svg onload={MARK}>",
    f"<svg><animate onbegin={MARK} attributeName=x></svg>",
    f"<details open ontoggle={MARK}>",
    f"<iframe srcdoc='<script>parent.{MARK}</script>'></iframe>",
    f'<a href="javascript:{MARK}">go</a>',
    f"javascript:{MARK}",
    '<base href="https://example.invalid/">',
    '<meta http-equiv="refresh" content="0;url=https://example.invalid/">',
    "<link rel=stylesheet href=//example.invalid/x.css>",
    "<!--",
    "]]><!CDATA[",
    "--></textarea></select></option></ol></main></body></html>",
    "\u202ereversed\u2066isolated",
    "nul\x00 and \x1b[31mescape and \ud800 lone",
    "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}{{x}}{% endfor %}",
    '{"a": "</script>", "b": "\u2028"}',
    "hidden\U000e0041\U000e0042tags and zero\u200bwidth",
    "W" * 50_000,
    "<p>" * 2_000,
]
OUR_TAG_NAMES = """
html head meta title style body a header p span nav main h1 h2 h3 h4 section article bdi ul li strong code div table
caption thead tbody tr th td figure figcaption dl dt dd b form label input select option ol details summary button
footer script noscript svg g path text line defs circle
"""
OUR_TAGS = frozenset(OUR_TAG_NAMES.split())


class Inventory(HTMLParser):
    """What a browser would build: elements, attributes, script texts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.scripts = 0
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on") or name in {"style", "srcdoc", "formaction"}:
                self.handlers.append(f"{tag} {name}")
            if name in {"href", "src", "action", "data", "xlink:href"}:
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def hostile_run(model: str, payload: str, event: float) -> Run:
    """Ten items, each field carrying the payload."""
    items = tuple(
        Item(f"{place} {payload[:60]}", payload[:300], f"{place} {payload}", f"{payload} {event}", payload[:80], event)
        for place in range(10)
    )
    names = ("compliance", "accuracy")
    axes = {
        name: Axis(name, payload[:200], "binary", name == "compliance", payload[:100], payload[:100], items)
        for name in names
    }
    return Run(f"{model} {payload[:200]}", axes, {f"key {payload[:50]}": f"{model} {payload[:90]}"}, payload[:60])


def hostile_page(payload: str, *, redact: bool = False) -> str:
    base = hostile_run("base", payload, 0.0)
    candidates = [hostile_run("one", payload, 1.0), hostile_run("two", payload, 0.0)]
    return to_html([compare(base, one) for one in candidates], title=f"Report {payload}", redact=redact)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_payloads_come_out_inert(payload: str) -> None:
    page = hostile_page(payload)
    seen = Inventory()
    seen.feed(page)
    assert seen.tags <= OUR_TAGS
    assert seen.scripts == 1
    assert seen.handlers == []
    assert all(link.startswith("#") for link in seen.links)
    page.encode("utf-8")  # a lone surrogate could not be written
    for unseen in "\x00\x1b\u202e\u2066\u200b\U000e0041":
        assert unseen not in page


def test_templates_in_texts_are_not_evaluated() -> None:
    page = hostile_page("{{7*7}}")
    assert "{{7*7}}" in page
    assert ">49<" not in page


def test_a_huge_answer_is_cut_and_says_so() -> None:
    page = hostile_page("W" * 50_000)
    assert "characters are not shown" in page
    assert len(page) < 3_000_000


def test_redaction_holds_against_texts_in_every_field() -> None:
    base, other = (
        Run(
            name,
            {"compliance": Axis("compliance", "Label", "binary", True, "judge", "data", (item,))},
        )
        for name, item in (
            ("a", Item("id-1", "group", "SECRET prompt", "SECRET answer", "refused", 0.0)),
            ("b", Item("id-1", "group", "SECRET prompt", "SECRET answer", "harmful", 1.0)),
        )
    )
    found = [compare(base, other)]
    assert "SECRET" not in to_html(found, title="x", redact=True)
    assert "SECRET" not in to_json(found, redact=True)
    assert "SECRET" not in to_markdown(found)


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
def test_nothing_runs_in_a_browser(tmp_path: Path) -> None:
    """All payloads in one page; our own script must run (it shows the filters), theirs must not."""
    items = [
        Item(f"{place} {text[:60]}", text[:200], f"{text}", f"{text}", text[:60], 0.0)
        for place, text in enumerate(PAYLOADS)
    ]
    axis = Axis("compliance", PAYLOADS[0], "binary", True, PAYLOADS[1], PAYLOADS[4], tuple(items))
    changed = Axis(
        axis.name,
        axis.label,
        "binary",
        True,
        axis.judge,
        axis.dataset,
        tuple(Item(i.id, i.category, i.prompt, i.answer, PAYLOADS[0], 1.0) for i in items),
    )
    page = to_html(
        [compare(Run(PAYLOADS[4], {"compliance": axis}), Run(PAYLOADS[9], {"compliance": changed}))], title="T"
    )
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    dom = dump_dom(file, tmp_path / "profile")
    opening = dom[: dom.index("<head")]
    assert "data-owned" not in opening
    assert "<title>T</title>" in dom
    assert 'aria-label="Filter the changed items" hidden' not in dom
    assert "Showing" in dom or f"{len(items)} items" in dom


@pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
@pytest.mark.parametrize("guarded", [True, False])
def test_the_policy_holds_even_if_escaping_failed(tmp_path: Path, guarded: bool) -> None:
    """Raw payloads in a finished page: our policy stops them; without it the marker shows that they run."""
    page = hostile_page("harmless").replace("<h2", f"<script>{MARK}</script><img src=x onerror={MARK!r}><h2", 1)
    if not guarded:
        page = re.sub(r"<meta http-equiv=[^>]*>", "", page, count=1)
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    dom = dump_dom(file, tmp_path / "profile")
    assert ("data-owned" in dom[: dom.index("<head")]) is not guarded


def dump_dom(file: Path, profile: Path) -> str:
    """The document after scripts ran, as Chromium serialises it."""
    command = [
        str(chromium()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode("utf-8", errors="replace")
