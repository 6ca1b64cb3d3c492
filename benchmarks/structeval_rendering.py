"""How fast is each format rendered warm, against one browser or one process for each item? Prints a table.

    python benchmarks/structeval_rendering.py [--json FILE] [--items 40] [--baseline 4] [--formats HTML Vega]
    python benchmarks/structeval_rendering.py --against OTHER/.venv/bin/python --rounds 3 --formats Angular TikZ

Items are the valid cases of ``tests/unit/structeval/cases``, repeated. ``warm``: items a second of one renderer that
has drawn each case before. ``cpu``: processor seconds for one item over all programs (its inverse times the cores is
what an idle machine can reach; wall time on a busy one says little). ``cold``: the same items, each with a renderer
started for it alone, which is what the original benchmark does, less its fixed pauses of 1 to 3 seconds; ``ratio``:
warm rate over cold rate. ``--against``: the Python of another checkout; both are measured in turn, ``--rounds`` times,
by processor seconds for one item, and the ratio of each pair is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.unit.structeval.case_files import load

from trimtab.structeval import sandbox
from trimtab.structeval.formats import FORMATS
from trimtab.structeval.render import Renderer, availability

BARS = {
    **dict.fromkeys(("HTML", "Canvas", "Markdown"), 8.0),
    **dict.fromkeys(("React", "Vue", "Angular", "LaTeX", "TikZ"), 3.0),
    **dict.fromkeys(("Mermaid", "Typst", "Vega", "SVG"), 10.0),
    "Matplotlib": 2.0,
}


class Row(NamedTuple):
    """Rates in items a second; ``cpu`` in seconds an item."""

    format: str
    items: int
    warm: float
    cpu: float
    cold: float
    ratio: float
    bar: float
    load: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--baseline", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--against", type=Path, help="Python of another checkout, to compare processor seconds with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(cost(options.formats[0], options.items)))
        return
    if options.against:
        for name in options.formats:
            print(compare(name, options.items, options.against, options.rounds), flush=True)
        return
    print(f"sandbox: {sandbox.isolation().level}; cores: {os.cpu_count()}")
    print(f"{'format':<11}{'n':>4}{'warm/s':>9}{'cpu s':>8}{'idle/s':>8}{'bar':>5}{'cold/s':>8}{'ratio':>7}{'load':>6}")
    rows = []
    for name in options.formats:
        if any(availability.missing(engine) for engine in FORMATS[name].needs):
            print(f"{name:<11} not installed")
            continue
        row = measure(name, options.items, options.baseline)
        rows.append(row)
        idle = (os.cpu_count() or 1) / row.cpu
        line = f"{name:<11}{row.items:>4}{row.warm:>9.1f}{row.cpu:>8.3f}{idle:>8.1f}{row.bar:>5.0f}"
        print(f"{line}{row.cold:>8.2f}{row.ratio:>7.1f}{row.load:>6.1f}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([one._asdict() for one in rows], indent=1))


def measure(name: str, count: int, baseline: int) -> Row:
    """Both ways, in this process, one after the other."""
    wall, cpu = cost(name, count)
    items = repeated(name, count)
    began = time.perf_counter()
    for _, text in items[:baseline]:
        with Renderer(workers=1) as alone:
            alone.render(name, text)
    cold = baseline / (time.perf_counter() - began)
    return Row(name, count, 1 / wall, cpu, cold, 1 / wall / cold, BARS[name], os.getloadavg()[0])


def repeated(name: str, count: int) -> list[tuple[str, str]]:
    """The valid cases, again and again."""
    texts = [case.text for case in load(name) if case.valid]
    return list(itertools.islice(itertools.cycle([(name, text) for text in texts]), count))


def cost(name: str, count: int) -> tuple[float, float]:
    """Wall and processor seconds for one item of a warm renderer."""
    items = repeated(name, count)
    with Renderer() as renderer:
        for _ in range(2):
            list(renderer.render_many(list(dict.fromkeys(items))))
        began, used = time.perf_counter(), processor_seconds()
        drawn = list(renderer.render_many(items))
        wall, cpu = time.perf_counter() - began, processor_seconds() - used
    failed = [one.errors for one in drawn if one.status != "rendered"]
    if failed:
        raise SystemExit(f"{name}: {len(failed)} of {count} were not rendered, so the speed means nothing: {failed[0]}")
    return wall / count, cpu / count


def compare(name: str, count: int, other: Path, rounds: int) -> str:
    """Processor seconds for one item there and here, in turn; median of each and the ratio of every pair."""
    found: dict[str, list[float]] = {str(other): [], sys.executable: []}
    for _ in range(rounds):
        for python, costs in found.items():
            argv = [python, __file__, "--one", "--formats", name, "--items", str(count)]
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
            costs.append(json.loads(done.stdout.splitlines()[-1])[1])
    there, here = found.values()
    ratios = ", ".join(f"{old / new:.2f}" for old, new in zip(there, here, strict=True))
    before, after = statistics.median(there), statistics.median(here)
    return f"{name:<11} n {count} x {rounds}: {before:.3f} -> {after:.3f} cpu s an item; ratios {ratios}"


def processor_seconds() -> float:
    """Of this process and of all that it has started and that still runs, with what those have waited for."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(word) for word in words[11:15])
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
