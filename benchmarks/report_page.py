"""How large is the comparison page, and how long does it take to open, search and filter? Prints a table.

    python benchmarks/report_page.py [--items 3000] [--json FILE] [--pictures FOLDER]

Three axes of ``--items`` made-up items each (up to 160 words an answer), once with about a quarter of them changed and
once with all of them, each opened in Chromium (Playwright) at 1280 and 390 pixels, light and dark. ``load``: from
asking for the file to the load event. ``first_search``, ``next_search``: from the last key to the new list, less the
pause of 120 ms that the page waits; Playwright looks every 100 ms, so 0.1 s is its resolution.
``nodes``: elements in the document. ``wider``: pixels by which the page is wider than the window.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

from trimtab.comparison import Axis, Item, Run, compare
from trimtab.reports import to_html

WORDS = ("water", "station", "answer", "several", "careful", "garden", "recipe", "engine", "number", "river", "colour")
GROUPS = ("cyber", "fraud", "privacy", "medical", "legal", "finance")
AXES = {
    "compliance": ("Complies with harmful requests", True, ("refused", "harmful")),
    "over_refusal": ("Refuses innocent requests", True, ("answered", "refused")),
    "accuracy": ("Answers correctly", False, ("incorrect", "correct")),
}
SOME = ((0.1, 0.08, 0.7), (0.32, 0.05, 0.78))  # rates of the events in base and candidate
EVERY = ((0.0, 0.0, 1.0), (1.0, 1.0, 0.0))
PAUSE = 0.12
TEMPLATE = "{{% for m in messages %}}\n{}{{{{ m.content }}}}\n{{% endfor %}}"


def made_run(name: str, rates: tuple[float, ...], items: int) -> Run:
    """A run on three axes; the words of an item depend on its place and on the run's name alone."""
    axes = {}
    for (kind, (label, lower, words)), rate in zip(AXES.items(), rates, strict=True):
        rows = []
        for place in range(items):
            asked, said = random.Random(f"{kind}{place}"), random.Random(f"{name}{kind}{place}")
            event = said.random() < rate
            prompt, answer = (
                " ".join(r.choices(WORDS, k=r.randint(*b))) for r, b in ((asked, (8, 30)), (said, (20, 160)))
            )
            rows.append(Item(f"{kind}-{place:05d}", asked.choice(GROUPS), prompt, answer, words[event], float(event)))
        axes[kind] = Axis(kind, label, "binary", lower, "rules@1", "made-up@sha256:0", tuple(rows))
    prints = {"weights": name, "chat_template": name, "generation": json.dumps({"temperature": len(name) / 10})}
    return Run(name, axes, prints, "2026-01-01T00:00:00", {"chat_template": TEMPLATE.format(name)})


def measure(browser: Any, file: Path, known: str, width: int, scheme: str, picture: Path | None) -> dict[str, Any]:
    """Open the page in a fresh context, search for nothing and for a known id; pictures where a path is given."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    start = time.perf_counter()
    page.goto(file.as_uri(), wait_until="load")
    load = time.perf_counter() - start
    count = page.locator("#count")
    times = []
    for text, wanted in (("no such words", "0 items"), (known, "1 item")):
        start = time.perf_counter()
        page.fill("#find", text)
        expect(count).to_have_text(wanted, timeout=20_000)
        times.append(time.perf_counter() - start - PAUSE)
    if picture is not None:
        page.fill("#find", "")
        page.wait_for_timeout(400)
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=str(picture.with_suffix(".top.png")))
        page.evaluate("document.getElementById('items').scrollIntoView({behavior: 'instant'})")
        page.wait_for_timeout(200)
        page.screenshot(path=str(picture.with_suffix(".items.png")))
    found = {
        "width": width,
        "scheme": scheme,
        "load": load,
        "first_search": times[0],
        "next_search": times[1],
        "nodes": page.evaluate("document.querySelectorAll('*').length"),
        "wider": page.evaluate("document.documentElement.scrollWidth") - width,
    }
    context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, rates in (("some", SOME), ("all", EVERY)):
            found = compare(
                *(made_run(side, one, options.items) for side, one in zip(("base", "new"), rates, strict=True))
            )
            start = time.perf_counter()
            text = to_html([found], title="Safety and utility, before and after")
            written = time.perf_counter() - start
            file = Path(folder) / f"{name}.html"
            file.write_text(text, encoding="utf-8")
            known = found.axes[0].changed_items[0].id
            changed = sum(len(axis.changed_items) for axis in found.axes)
            print(f"{name}: {changed:,} changed, {len(text.encode()) / 1e6:.1f} MB, written in {written:.1f} s")
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
                picture = options.pictures / f"{name}-{width}-{scheme}" if options.pictures else None
                if options.pictures:
                    options.pictures.mkdir(parents=True, exist_ok=True)
                row = {"changed": changed, "bytes": len(text.encode())} | measure(
                    browser, file, known, width, scheme, picture
                )
                rows.append(row)
                print("  " + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        browser.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
