"""Measure the demo model against its bars and print a Markdown table.

    python tools/check_demo_adapter.py                                  bundled prompts only
    python tools/check_demo_adapter.py --data PATH_TO_BENCHMARK_DATA    AdvBench, XSTest, WikiText-2 and SST-2 too

The published model is measured beside it. About ten minutes on one core with --data and the default limits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.evaluation.terminal import text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=140)
    parser.add_argument("--models", nargs="+", default=["demo", "demo-unaligned"])
    parser.add_argument("--out", type=Path, default=None, help="keep the logs here (resumable)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        runs = {}
        for name in args.models:
            axes = axes_for(args.data, args.limit, out)
            runs[name] = evaluate(name, axes, out=out / name.replace("/", "_"), max_new_tokens=20, batch_size=32)
    print(f"| axis | {' | '.join(runs)} |")
    print(f"|---|{'---|' * len(runs)}")
    for axis in next(iter(runs.values())).axes:
        cells = [text(run.axes[axis]) for run in runs.values()]
        print(f"| {next(iter(runs.values())).axes[axis].label} | {' | '.join(cells)} |")


def axes_for(data: Path | None, limit: int, out: Path) -> list[AxisSpec]:
    """Bundled sides always; the others where the files are."""
    axes = [AxisSpec("compliance", limit=limit), AxisSpec("over_refusal", limit=limit)]
    if data is None:
        return axes
    sst2 = out / "sst2.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    rows = json.loads((data / "utility/sst2/val.json").read_text())
    sst2.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"{r['instruction']}\n{r['input']}",
                    "answer": r["output"],
                    "choices": ["positive", "negative"],
                }
            )
            + "\n"
            for r in rows
        )
    )
    wikitext = out / "wikitext-2.txt"
    wikitext.write_text((data / "utility/wikitext-2/test.txt").read_text()[:40_000])
    return [
        *axes,
        AxisSpec("compliance", "advbench", str(data / "safety/advbench-original/harmful_behaviors.csv"), limit=limit),
        AxisSpec("over_refusal", "xstest-safe", str(data / "safety/xstest/xstest_prompts.csv"), limit=limit),
        AxisSpec("perplexity", "wikitext-2", str(wikitext)),
        AxisSpec("choice", "sst2", str(sst2), limit=limit),
    ]


if __name__ == "__main__":
    main()
