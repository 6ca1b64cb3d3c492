"""How often is the refusal-rule judge right? Prints the table of ``docs/results/judge-rules.md``.

    python benchmarks/judge_accuracy.py --data PATH_TO_DATA [--json FILE] [--errors]

PATH_TO_DATA holds any of: ``judge/xstest-responses/*.csv`` (answers with human labels),
``judge/pyrit-scorer-evals/refusal/refusal.csv`` (human labels), ``judge/jailbreakbench-artifacts/*.json`` (automatic
verdicts). What is absent is skipped.
The positive class is "refused": a false positive is an answer called a refusal (it hides compliance), a false negative
a refusal called an answer (it invents compliance).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trimtab.comparison.statistics import wilson_interval
from trimtab.evaluation.judges import JUDGE, judge

XSTEST = {"llama2new": "development", "mistralinstruct": "development", "gpt4": "held out"}


class Labelled(NamedTuple):
    """One answer; ``refused`` is the label, None where the label is "partial refusal"."""

    prompt: str
    answer: str
    refused: bool | None


class Table(NamedTuple):
    """Counts of one data set. ``unclear``: answers that the judge called incoherent or unscored."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    unclear: int
    partial_refused: int
    partial: int

    @property
    def total(self) -> int:
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative


def tabulate(rows: Sequence[Labelled]) -> Table:
    """Judge all rows; what the judge calls incoherent or unscored counts as "not refused" and is also counted apart."""
    counts: Counter[tuple[bool | None, bool]] = Counter()
    unclear = 0
    for row in rows:
        label = judge(row.prompt, row.answer).label
        unclear += label in ("incoherent", "unscored")
        counts[row.refused, label == "refused"] += 1
    partial = counts[None, True] + counts[None, False]
    return Table(
        counts[True, True],
        counts[False, True],
        counts[True, False],
        counts[False, False],
        unclear,
        counts[None, True],
        partial,
    )


def xstest(folder: Path) -> Iterator[tuple[str, list[Labelled]]]:
    """XSTest answers of three models; 1 full compliance, 2 full refusal, 3 partial refusal."""
    for model, role in XSTEST.items():
        path = folder / f"xstest_v2_completions_{model}.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            label = {"1": False, "2": True, "3": None}
            yield (
                f"XSTest, {model} ({role})",
                [Labelled(row["prompt"], row["completion"], label[row["final_label"][0]]) for row in rows],
            )


def pyrit(path: Path) -> Iterator[tuple[str, list[Labelled]]]:
    """PyRIT's refusal set; its definition counts an answer to another question as a refusal."""
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(line for line in stream if not line.startswith("# dataset")))
        found = [Labelled(row["objective"], row["assistant_response"], row["human_score"] == "1") for row in rows]
        yield "PyRIT refusal (see text)", found


def jailbreakbench(folder: Path) -> Iterator[tuple[str, list[Labelled]]]:
    """JailbreakBench artifacts: automatic verdicts, so "not jailbroken" is a refusal or an answer that does no harm."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content.get("jailbreaks", []):
            if row["response"]:
                rows.append(Labelled(row["goal"], row["response"], not row["jailbroken"]))
    if rows:
        yield "JailbreakBench artifacts (automatic)", rows


def share(part: int, whole: int) -> str:
    """``0.959 [0.936, 0.974]``."""
    if whole == 0:
        return "-"
    low, high = wilson_interval(part, whole)
    return f"{part / whole:.3f} [{low:.3f}, {high:.3f}]"


def line(name: str, table: Table) -> str:
    """One row of the Markdown table."""
    right = table.true_positive + table.true_negative
    answered = table.false_positive + table.true_negative
    refused = table.true_positive + table.false_negative
    cells = [
        name,
        str(table.total),
        share(right, table.total),
        f"{table.false_positive}/{answered}: {share(table.false_positive, answered)}",
        f"{table.false_negative}/{refused}: {share(table.false_negative, refused)}",
        f"{table.partial_refused}/{table.partial}" if table.partial else "-",
        str(table.unclear),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; exit code 2 where no data is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds judge/...")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--errors", action="store_true", help="print the prompts and reasons of the wrong verdicts")
    args = parser.parse_args()
    base = args.data / "judge"
    sets = [
        *xstest(base / "xstest-responses"),
        *pyrit(base / "pyrit-scorer-evals" / "refusal" / "refusal.csv"),
        *jailbreakbench(base / "jailbreakbench-artifacts"),
    ]
    if not sets:
        print(f"no labelled answers under {base}", file=sys.stderr)
        return 2
    print(f"judge: {JUDGE}\n")
    print("| answers | n | accuracy | false positives | false negatives | partial: called refusals | unclear |")
    print("|---|---|---|---|---|---|---|")
    tables = {name: tabulate(rows) for name, rows in sets}
    for name, table in tables.items():
        print(line(name, table))
    if args.errors:
        print_errors(sets)
    if args.json:
        args.json.write_text(
            json.dumps({"judge": JUDGE, "tables": {k: v._asdict() for k, v in tables.items()}}, indent=2)
        )
    return 0


def print_errors(sets: Sequence[tuple[str, list[Labelled]]]) -> None:
    """The prompts (not the answers) of the wrong verdicts."""
    for name, rows in sets:
        for row in rows:
            verdict = judge(row.prompt, row.answer)
            if row.refused is not None and row.refused != (verdict.label == "refused"):
                print(f"{name}\tlabel refused={row.refused}\t{verdict.label}\t{verdict.reason}\t{row.prompt[:100]!r}")


if __name__ == "__main__":
    sys.exit(main())
