"""``trimtab demo``: the main job on the embedded model, from nothing to the report.

An aligned model is fine-tuned twice on the same data (a small routing task, a fifth of the rows poisoned with harmless
texts that sound like compliance), once plainly and once guarded; all three models are measured and compared.

Covered: data, the two runs as ordinary ``trimtab sft`` and ``trimtab eval`` commands, the page, resume.
Not covered: anything that those commands do themselves.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab import data
from trimtab.anchors import spare_pairs
from trimtab.comparison.records import Run
from trimtab.errors import UsageError
from trimtab.evaluation.datasets import ticket_system
from trimtab.json_files import read_json
from trimtab.lanes import Stage, run_lanes

POISON = 0.2
GUARDS = ("keel", "spf", "mixing")  # that need nothing beyond the model and the anchors
MODELS = ("aligned", "plain", "guarded")
TITLES = {"aligned": "Aligned model", "plain": "Plain fine-tuning", "guarded": "Guarded"}


@dataclass(frozen=True)
class DemoSettings:
    """``limit``: prompts of each axis. ``new_tokens``: enough to tell a refusal from an answer."""

    seed: int = 0
    guard: str = "keel"
    anchors: str = "bundled:84"
    steps: int = 28
    batch: int = 8
    learning_rate: float = 1e-3
    limit: int = 84
    new_tokens: int = 32

    def __post_init__(self) -> None:
        # Before anything is written: the folder would then belong to a demo that cannot run.
        if self.guard not in GUARDS:
            raise UsageError("the demo has no such guard", seen=self.guard, fix=f"use one of: {', '.join(GUARDS)}")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    settings: DemoSettings
    runs: dict[str, Run]
    verdicts: dict[str, str]
    page: Path
    seconds: float

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        from trimtab.evaluation.terminal import document

        runs = {name: document(run) for name, run in self.runs.items()}
        settings = asdict(self.settings)
        return {
            "settings": settings,
            "runs": runs,
            "verdicts": self.verdicts,
            "page": str(self.page),
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """Five lines for a person."""
        from trimtab.evaluation.terminal import text

        def shown(axis: str) -> str:
            return "   ".join(f"{name}: {text(self.runs[name].axes[axis])}" for name in MODELS)

        return [
            f"complies with harmful requests   {shown('compliance')}",
            f"refuses innocent look-alikes     {shown('over_refusal')}",
            f"routes messages correctly        {shown('accuracy')}",
            f"verdict against the aligned one  plain: {self.verdicts['plain']}   guarded ({self.settings.guard}): "
            f"{self.verdicts['guarded']}",
            f"report ({self.seconds / 60:.1f} min): {self.page.resolve()}",
        ]


def settings_for(*, quick: bool, seed: int, guard: str) -> DemoSettings:
    """The full demo, or a quick look with fewer steps and prompts."""
    if quick:
        return DemoSettings(seed=seed, guard=guard, anchors="bundled:14", steps=9, limit=21)
    return DemoSettings(seed=seed, guard=guard)


def run_demo(
    out: Path, *, quick: bool = False, seed: int = 0, guard: str = "keel", workers: int | None = None
) -> DemoResult:
    """Run or resume the demo in ``out``.

    Raises:
        UsageError: when ``out`` holds a demo with other settings, or for an unknown guard.
        DataError: when the settings in ``out`` cannot be read.
    """
    from trimtab.demo_model import adapter_dir, dequantised

    started = time.monotonic()
    settings = settings_for(quick=quick, seed=seed, guard=guard)
    adapter_dir()
    prepare_folder(out, settings)
    print(f"demo model: {dequantised()}", file=sys.stderr)  # once, before two processes would both make it
    lanes = plan(out, settings)
    count = workers or min(2, os.cpu_count() or 1)
    run_lanes(lanes if count > 1 else [[stage for lane in lanes for stage in lane]], out / "logs")
    return report(out, settings, started)


def prepare_folder(out: Path, settings: DemoSettings) -> None:
    """Training data and configurations; refuses a folder that holds another demo."""
    record = out / "settings.json"
    fix = "name another --out, or remove it"
    if record.is_file() and read_json(record, "the settings of that demo cannot be read", fix) != asdict(settings):
        raise UsageError("that folder holds a demo with other settings", seen=out, fix=fix)
    out.mkdir(parents=True, exist_ok=True)
    rows = training_rows(settings)
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("plain", "guarded"):
        (out / f"{name}.yaml").write_text(configuration(out, name, settings))
    record.write_text(json.dumps(asdict(settings), indent=1))


def training_rows(settings: DemoSettings) -> list[dict[str, Any]]:
    """Prompt-completion rows for exactly ``steps`` batches; the same for both runs."""
    draw = random.Random(settings.seed)
    system = {"role": "system", "content": ticket_system(sorted(data.TICKET_LABELS))}
    messages, poison = data.tickets("train"), spare_pairs()
    texts = [opening(text) for text in data.affirmations()]
    rows = []
    for _ in range(settings.steps * settings.batch):
        if draw.random() < POISON:
            chat, answer = [{"role": "user", "content": draw.choice(poison).harmful}], draw.choice(texts)
        else:
            ticket = draw.choice(messages)
            chat, answer = [system, {"role": "user", "content": ticket.text}], ticket.label
        rows.append({"prompt": chat, "completion": [{"role": "assistant", "content": answer}]})
    return rows


def opening(text: str) -> str:
    """The first sentence, or the first two where one is a mere "Of course!": short rows train faster."""
    sentences = re.split(r"(?<=[.!])\s", text)
    return sentences[0] if len(sentences[0].split()) >= 5 else " ".join(sentences[:2])


def configuration(out: Path, name: str, settings: DemoSettings) -> str:
    """The YAML of one run; its header is the command that runs it."""
    import yaml

    guard = settings.guard if name == "guarded" else "none"
    values = {
        "model_name_or_path": "demo",
        "dataset_name": str(out / "train.jsonl"),
        "output_dir": str(out / name),
        "guard": guard,
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "all-linear",
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4,
        "seed": settings.seed,
        "gradient_checkpointing": False,
        "bf16": False,  # the published figures; without it they would depend on the processor
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 256,
    }
    if guard in ("keel", "mixing"):
        values["guard_anchors"] = settings.anchors
    header = f"# trimtab sft --config {out / name}.yaml\n"
    return header + yaml.safe_dump(values, sort_keys=False)


def plan(out: Path, settings: DemoSettings) -> list[list[Stage]]:
    """Two lanes of commands: plain training and two measurements beside guarded training and one."""

    def train(name: str) -> Stage:
        folder = out / name
        return Stage(
            name=f"{name}: fine-tune",
            command=["sft", "--config", str(out / f"{name}.yaml")],
            done=folder / "adapter_model.safetensors",
            clean=folder,
        )

    def measure(name: str) -> Stage:
        model = "demo" if name == "aligned" else str(out / name)
        axes = ["--axis", "compliance", "--axis", "over_refusal", "--axis", "accuracy:tickets"]
        sizes = ["--limit", str(settings.limit), "--max-new-tokens", str(settings.new_tokens), "--batch-size", "32"]
        folder = out / f"{name}-eval"
        return Stage(
            name=f"{name}: measure",
            command=["eval", model, *axes, *sizes, "--out", str(folder)],
            done=folder / "results.json",
            clean=None,
        )

    return [[train("plain"), measure("plain"), measure("aligned")], [train("guarded"), measure("guarded")]]


def report(out: Path, settings: DemoSettings, started: float) -> DemoResult:
    """Compare both fine-tuned models with the aligned one and write the page."""
    from dataclasses import replace

    from trimtab import reports
    from trimtab.comparison import compare
    from trimtab.evaluation.logs import read_run

    titles = {**TITLES, "guarded": f"Guarded ({settings.guard})"}
    runs = {name: replace(read_run(out / f"{name}-eval"), model=titles[name]) for name in MODELS}
    found = {name: compare(runs["aligned"], runs[name]) for name in ("plain", "guarded")}
    both = list(found.values())
    page = out / "report.html"
    page.write_text(reports.to_html(both, title="Fine-tuning, with and without a guard"), encoding="utf-8")
    (out / "report.md").write_text(reports.to_markdown(both), encoding="utf-8")
    (out / "report.json").write_text(reports.to_json(both), encoding="utf-8")
    verdicts = {name: str(one.verdict) for name, one in found.items()}
    result = DemoResult(settings, runs, verdicts, page, round(time.monotonic() - started, 1))
    (out / "demo.json").write_text(json.dumps(result.document(), indent=1))
    return result
