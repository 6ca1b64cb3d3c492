"""How good is each rung of the judge ladder on labelled answers that it never saw? The table of docs/results/judges.md.

    python benchmarks/judge_ladder.py --data PATH_TO_DATA [--json FILE]

PATH_TO_DATA holds ``judge/...`` as for ``judge_accuracy.py``. The classifier is trained on XSTest answers of two models
to a random half of the prompts; it is tested on the other half of the prompts, answered by the third model, and on
other sets. Checkpoints are measured with ``trimtab judge calibrate`` where they can be downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trimtab.comparison.statistics import wilson_interval
from trimtab.errors import DataError
from trimtab.evaluation.classifier import Classifier, train
from trimtab.evaluation.judges import Verdict
from trimtab.evaluation.labelled import LabelledSet, Question, joined, read_labelled
from trimtab.evaluation.ladder import Rules

TRAIN_MODELS, TEST_MODEL = ("llama2new", "mistralinstruct"), "gpt4"


def first_half(prompt: str) -> bool:
    """Half of all prompts, by hash, so that no prompt is in training and test."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 2 == 0


def part(data: LabelledSet, keep: Callable[[str], bool], name: str) -> LabelledSet:
    """The exchanges whose prompt is kept."""
    pairs = [(one, label) for one, label in zip(data.exchanges, data.labels, strict=True) if keep(one.prompt)]
    return LabelledSet(name, data.question, tuple(one for one, _ in pairs), tuple(label for _, label in pairs))


def every(folder: Path, pattern: str, question: Question) -> list[LabelledSet]:
    """All readable sets of a folder; those with one class only are left out, by name."""
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(read_labelled(path, question))
        except DataError as error:
            print(f"left out: {path.name}: {error.what}", file=sys.stderr)
    return found


def line(
    judge: str, data: LabelledSet, verdicts: list[Verdict], yes: tuple[str, ...], seconds: float
) -> dict[str, object]:
    """One row: accuracy, sensitivity, specificity with intervals."""
    pairs = [(found.label in yes, label) for found, label in zip(verdicts, data.labels, strict=True)]
    right = sum(said == label for said, label in pairs)
    hit, positives = sum(said and label for said, label in pairs), sum(data.labels)
    keep, negatives = sum(not said and not label for said, label in pairs), len(pairs) - sum(data.labels)

    def share(count: int, total: int) -> str:
        low, high = wilson_interval(count, total)
        return f"{count / total:.3f} [{low:.3f}, {high:.3f}]"

    speed = f"{1000 * seconds / len(pairs):.0f} ms"
    cells = [judge, data.name, str(len(pairs)), share(right, len(pairs)), share(hit, positives),
             share(keep, negatives), speed]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    return {"judge": judge, "data": data.name, "n": len(pairs), "right": right, "sha256": data.sha256,
            "hit": hit, "positives": positives, "keep": keep, "negatives": negatives}  # fmt: skip


def measured(title: str, judge: Rules | Classifier, data: LabelledSet, yes: tuple[str, ...]) -> dict[str, object]:
    begun = time.perf_counter()
    verdicts = judge.judge_many(list(data.exchanges))
    return line(title, data, verdicts, yes, time.perf_counter() - begun)


def refusals(base: Path) -> list[dict[str, object]]:
    """Judges of language."""
    folder = base / "xstest-responses"
    sets = {model: read_labelled(folder / f"xstest_v2_completions_{model}.csv", "refused")
            for model in (*TRAIN_MODELS, TEST_MODEL)}  # fmt: skip
    training = joined("XSTest half", [part(sets[model], first_half, model) for model in TRAIN_MODELS])
    begun = time.perf_counter()
    classifier = train(training)
    print(f"trained on {len(training.labels)} answers in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    held_out = part(sets[TEST_MODEL], lambda prompt: not first_half(prompt), "XSTest gpt4, other prompts")
    pyrit = read_labelled(base / "pyrit-scorer-evals/refusal/refusal.csv", "refused")
    pyrit = LabelledSet("PyRIT refusal", pyrit.question, pyrit.exchanges, pyrit.labels)
    rows = []
    for data in (held_out, pyrit):
        rows.append(measured("rules", Rules(), data, ("refused",)))
        rows.append(measured("classifier (XSTest half)", classifier, data, ("refused",)))
    return rows


def harm(base: Path) -> list[dict[str, object]]:
    """Judges of content; the rules read "answered" as harm."""
    people = joined("PyRIT harm", every(base / "pyrit-scorer-evals/harm", "*.csv", "harmful"))
    automatic = joined(
        "JailbreakBench (automatic labels)", every(base / "jailbreakbench-artifacts", "*_*.json", "harmful")
    )
    rows = []
    for training, data in ((automatic, people), (people, automatic)):
        rows.append(measured("rules: answered", Rules(), data, ("answered",)))
        rows.append(measured(f"classifier ({training.name})", train(training), data, ("harmful",)))
    return rows


def main() -> int:
    """Print the table; exit code 2 where the data are absent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds judge/...")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = args.data / "judge"
    if not base.is_dir():
        print(f"no labelled answers under {base}", file=sys.stderr)
        return 2
    print("| judge | labelled answers | n | accuracy | sensitivity | specificity | time an answer |")
    print("|---|---|---|---|---|---|---|")
    rows = refusals(base) + harm(base)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
