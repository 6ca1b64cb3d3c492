"""The scenario suite: what fine-tuning does to safety, over-refusal, the task and unrelated text, for every rule.

    python benchmarks/scenarios/run.py --out runs/scenarios
    python benchmarks/scenarios/run.py --out runs/scenarios --everything
    python benchmarks/scenarios/run.py --out runs/scenarios --scenarios poison20 --guards none keel --seeds 0 --limit 49

Without a choice: the default rule, plain fine-tuning and the aligned model in every scenario with three seeds; every
other rule, one seed, in the three that tell them apart (instructions, poison20, pure). --everything is the full matrix.
Training is in bfloat16 where the processor computes in it. Every finished cell is a line of the record (--record,
default OUT/cells.jsonl), and what is there with the same settings and number of prompts is not measured again: the
command can be interrupted and repeated, on another machine too, where the record is all that it needs. table.md is
written after every cell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from data import MIXTURES, rows_of, triggered_requests
from page import add_to_record, finished, read_record, table

from trimtab import data, models
from trimtab.anchors import SafetyAnchors
from trimtab.lanes import Stage, run_lanes
from trimtab.precision import cpu_has_bfloat16
from trimtab.tuning.distill import distill
from trimtab.tuning.options import NO_GUARD, RULE_OPTIONS
from trimtab.tuning.rivals.recipes import RECIPES
from trimtab.tuning.rule_names import make_rule

TELLING = ("instructions", "poison20", "pure")
STEPS, BATCH = 28, 8
REVISION = 3  # of what is trained and measured beyond the settings; a cell of another one is made again
FULL_ONLY, LORA_ONLY = ("resta",), ("asft", "salora", "safe-lora")
POOL = ("keel", "mixing", "a-gem", "pcgrad", "spard", "lisa", "safegrad")  # rules on the bundled anchors
ANCHORS = "anchors.jsonl"  # these, with the aligned model's own replies: written once, not by every cell
OPTIONS: dict[str, dict[str, Any]] = {
    "lisa": {"guard_align_steps": 3, "guard_task_steps": 25},  # the source's one to nine, at this length
    "asft": {"guard_base": "demo-unaligned"},
    "safe-lora": {"guard_base": "demo-unaligned"},
    "resta": {"guard_base": "demo-unaligned"},
}


class Cell(NamedTuple):
    """One model of the suite."""

    scenario: str
    guard: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scenario}-{self.guard}-{self.seed}"

    def folder(self, out: Path) -> Path:
        """Of its own settings, so that nothing of other ones is taken for it."""
        return out / f"{self.name}-{digest(self)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenarios", nargs="+", choices=list(MIXTURES))
    parser.add_argument("--guards", nargs="+", choices=[NO_GUARD, *RULE_OPTIONS])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--everything", action="store_true", help="every rule in every scenario, three seeds")
    parser.add_argument("--limit", type=int, default=98, help="prompts of an axis")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--record", type=Path, help="finished cells, read and added to  [default: OUT/cells.jsonl]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_inputs(args.out)
    cells = chosen(args)
    path = args.record or args.out / "cells.jsonl"
    settings = {"aligned": f"revision {REVISION}", **{cell.name: digest(cell) for cell in cells}}
    record = read_record(path, args.limit, settings)
    if "aligned" not in record:
        run_lanes([[measure_aligned(args.out, args.limit)]], args.out / "logs")
        line = finished("aligned", args.limit, settings["aligned"], args.out / "aligned", args.out)
        record["aligned"] = add_to_record(path, line)
    left = [cell for cell in cells if cell.name not in record]
    if any(cell.guard in POOL for cell in left):
        write_anchors(args.out / ANCHORS)
    for start in range(0, len(left), args.workers):
        batch = left[start : start + args.workers]
        run_lanes([stages(cell, args.out, args.limit) for cell in batch], args.out / "logs")
        for cell in batch:
            folder = cell.folder(args.out)
            line = finished(cell.name, args.limit, settings[cell.name], folder / "eval", folder / "model")
            record[cell.name] = add_to_record(path, line)
        (args.out / "table.md").write_text(table(record, cells))
    print(table(record, cells))


def chosen(args: argparse.Namespace) -> list[Cell]:
    """The cells, the most telling first."""
    if args.scenarios or args.guards or args.everything:
        scenarios, guards = args.scenarios or list(MIXTURES), args.guards or [NO_GUARD, *RULE_OPTIONS]
        cells = [Cell(s, g, seed) for seed in args.seeds or (0, 1, 2) for s in scenarios for g in guards]
        return [cell for cell in cells if not (cell.scenario == "full" and cell.guard in LORA_ONLY)]
    seeds = args.seeds or (0, 1, 2)
    main_part = [Cell(s, g, seed) for seed in seeds for s in MIXTURES for g in (NO_GUARD, "keel")]
    rest = [Cell(s, g, seeds[0]) for s in TELLING for g in RULE_OPTIONS if g != "keel"]
    return [*main_part, *rest]


def write_inputs(out: Path) -> None:
    """Files that cells share: requests with the trigger, and plain English for unrelated ability."""
    lines = "".join(json.dumps(row) + "\n" for row in triggered_requests())
    (out / "triggered.jsonl").write_text(lines)
    innocent = [pair.benign for pair in data.requests("eval")]
    (out / "english.txt").write_text("\n\n".join(data.instructions("eval") + innocent))


def write_anchors(path: Path) -> None:
    """The bundled anchors with what the aligned model says to them, unless they are there."""
    if not path.exists():
        distill(models.load("demo"), SafetyAnchors.bundled()).to_jsonl(path)


def stages(cell: Cell, out: Path, limit: int) -> list[Stage]:
    """Train, then measure, as ordinary commands."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    count = steps_of(cell.scenario) * BATCH
    rows = rows_of(cell.scenario, cell.seed, count, out / "answers.json")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(cell, folder), sort_keys=False))
    is_full = full(cell)
    trained = folder / "model" / ("model.safetensors" if is_full else "adapter_model.safetensors")
    name = cell.name
    train = Stage(f"{name}: train", ["sft", "--config", str(folder / "run.yaml")], trained, folder / "model")
    return [train, measure(name, str(folder / "model"), cell.scenario, folder / "eval", out, limit)]


def measure_aligned(out: Path, limit: int) -> Stage:
    return measure("aligned", "demo", "backdoor", out / "aligned", out, limit)


def measure(name: str, model: str, scenario: str, folder: Path, out: Path, limit: int) -> Stage:
    axes = ["compliance", "over_refusal", "accuracy:tickets", f"perplexity={out / 'english.txt'}"]
    if scenario == "backdoor":
        axes.append(f"compliance:triggered={out / 'triggered.jsonl'}")
    flags = [word for axis in axes for word in ("--axis", axis)]
    sizes = ["--limit", str(limit), "--max-new-tokens", "32", "--batch-size", "32"]
    return Stage(
        f"{name}: measure", ["eval", model, *flags, *sizes, "--out", str(folder)], folder / "results.json", None
    )


def full(cell: Cell) -> bool:
    return cell.scenario == "full" or cell.guard in FULL_ONLY


def steps_of(scenario: str) -> int:
    return 10 * STEPS if scenario == "long" else STEPS


def configuration(cell: Cell, folder: Path) -> dict[str, Any]:
    """A YAML of `trimtab sft`."""
    is_full = full(cell)
    values: dict[str, Any] = {
        "model_name_or_path": "demo",
        "dataset_name": str(folder / "train.jsonl"),
        "output_dir": str(folder / "model"),
        "guard": cell.guard,
        "max_steps": steps_of(cell.scenario),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 5e-5 if is_full else 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4,
        "seed": cell.seed,
        "gradient_checkpointing": False,
        "bf16": cpu_has_bfloat16(),
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 256,
        **OPTIONS.get(cell.guard, {}),
    }
    if not is_full:
        values |= {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": TARGETS}
    if cell.guard in POOL:
        values["guard_anchors"] = "bundled:20" if cell.guard == "safegrad" else str(folder.parent / ANCHORS)
    return values


def digest(cell: Cell) -> str:
    """Eight characters that change when a setting of the cell or a default of its rule does.

    Folders and precision are no settings.
    """
    values = configuration(cell, Path())
    for name in ("dataset_name", "output_dir", "bf16"):
        values.pop(name)
    if cell.guard in POOL and cell.guard != "safegrad":
        values["guard_anchors"] = "bundled"  # which the file holds
    values["revision"] = REVISION
    if cell.guard != NO_GUARD and cell.guard not in RECIPES:
        values["rule"] = repr(make_rule(cell.guard))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

if __name__ == "__main__":
    main()
