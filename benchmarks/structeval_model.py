"""Let a model answer StructEval tasks, score and draw what it wrote, and report: both scores, what it cost, a gallery.

    python benchmarks/structeval_model.py demo --out runs/structeval-demo --t-tasks structeval_t.jsonl --t-limit 200
    python benchmarks/structeval_model.py demo --out runs/try --v-limit 3 --max-tokens 40

The rendered tasks are the 65 of ``benchmarks/structeval/v_tasks.jsonl`` (five of each of 13 formats, written for this
project); the text tasks come from a file in the data set's schema. Everything is written as it comes: the same command
goes on after an interruption. In OUT: ``answers.jsonl``, ``pictures/``, ``gallery.html``, ``tables.md`` and
``report.json``. Without a judge a rendered task has its parts (rendered or not, keywords) and no final score.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from trimtab.structeval import gallery, generations, run, table, tasks, vqa
from trimtab.structeval.generate import Progress, Settings, generate
from trimtab.structeval.render import version

V_TASKS = Path(__file__).parent / "structeval" / "v_tasks.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--t-tasks", type=Path, help="text tasks, in the data set's schema")
    parser.add_argument("--t-limit", type=int, default=200)
    parser.add_argument("--v-limit", type=int, help="only so many rendered tasks, spread over the task types")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--judge", help="vision model for the questions: local/NAME, or as inspect names it")
    options = parser.parse_args()
    chosen = tasks.load(V_TASKS, limit=options.v_limit)
    if options.t_tasks:
        chosen = tasks.load(options.t_tasks, splits=("t",), limit=options.t_limit) + chosen
    options.out.mkdir(parents=True, exist_ok=True)
    answers = options.out / "answers.jsonl"
    began = time.perf_counter()
    made = generate(options.model, chosen, answers, Settings(options.max_tokens, batch_size=options.batch_size))
    asked = time.perf_counter()
    wanted = {task.id for task in chosen}
    found = [one for one in generations.read(answers) if one.task.id in wanted]
    store = options.out / "pictures"
    judge = vqa.judge_named(options.judge, cache=store / "judge.jsonl") if options.judge else None
    items = run.score_all(found, pictures="render", judge=judge, store=store)
    scored = time.perf_counter()
    report = document(options, items, made) | {
        "seconds": {"answers": round(asked - began, 1), "scores": round(scored - asked, 1)},
    }
    write(options.out / "report.json", json.dumps(report, indent=1))
    write(options.out / "tables.md", table.markdown(items))
    write(options.out / "gallery.html", gallery.to_html(items, title=f"StructEval: {options.model}"))
    print(table.markdown(items))
    print(json.dumps({key: report[key] for key in ("answers", "statuses", "seconds")}, indent=1))
    print(f"gallery: {options.out / 'gallery.html'}")


def document(options: argparse.Namespace, items: list[run.Item], made: Progress) -> dict[str, Any]:
    """What is to be known beside the tables; ``statuses``: what the renderer said, by format."""
    statuses: dict[str, Counter[str]] = {}
    for item in items:
        if item.drawn is not None:
            statuses.setdefault(item.generated.task.output_format, Counter())[item.drawn.status] += 1
    return {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "answers": {"total": made.done, "kept": made.kept, "cut": made.cut},
        "statuses": statuses,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "renderers": json.loads(version()),
        **table.document(items),
        "items": [item.document() for item in items],
    }


def write(path: Path, text: str) -> None:
    """In one step, so that no half of it is ever seen."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
