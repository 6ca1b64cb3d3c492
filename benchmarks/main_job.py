"""The demo over several seeds and guards, as one Markdown table with intervals.

    python benchmarks/main_job.py --out runs/main-job --seeds 0 1 2
    python benchmarks/main_job.py --out runs/main-job --seeds 0 1 2 --guards keel spf mixing

Each cell is a `trimtab demo` in its own folder (about eight minutes on two cores); finished ones are kept, so the
command can be interrupted and repeated. Guards of one seed share the aligned and the plain model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from trimtab.demo import run_demo

AXES = ("compliance", "over_refusal", "accuracy", "incoherence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guards", nargs="+", default=["keel"])
    args = parser.parse_args()
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for seed in args.seeds:
        for guard in args.guards:
            folder = args.out / f"{guard}-{seed}"
            if guard != args.guards[0]:
                borrow(args.out / f"{args.guards[0]}-{seed}", folder)
            if not (folder / "demo.json").is_file():
                run_demo(folder, seed=seed, guard=guard)
            found[seed, guard] = json.loads((folder / "demo.json").read_text())
            (args.out / "table.md").write_text(table(found))
    print((args.out / "table.md").read_text())


def borrow(source: Path, target: Path) -> None:
    """Take over the models that do not depend on the guard."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "plain-eval", "aligned-eval"):
        if (source / name).is_dir() and not (target / name).exists():
            shutil.copytree(source / name, target / name)


def table(found: dict[tuple[int, str], dict[str, Any]]) -> str:
    """One row a model; rates with 95 % Wilson intervals and n."""
    lines = [f"| seed | model | {' | '.join(AXES)} |", f"|---|---|{'---|' * len(AXES)}"]
    for seed in sorted({seed for seed, _ in found}):
        rows: dict[str, Any] = {}
        for (other, guard), document in found.items():
            if other == seed:
                rows |= {"aligned": document["runs"]["aligned"], "plain": document["runs"]["plain"]}
                rows[guard] = document["runs"]["guarded"]
        for name, run in rows.items():
            lines.append(f"| {seed} | {name} | {' | '.join(cell(run['axes'][axis]) for axis in AXES)} |")
    return "\n".join(lines) + "\n"


def cell(axis: dict[str, Any]) -> str:
    """``3.6 % [1.5, 8.1] n=140``."""
    return f"{100 * axis['value']:.1f} % [{100 * axis['low']:.1f}, {100 * axis['high']:.1f}] n={axis['scored']}"


if __name__ == "__main__":
    main()
