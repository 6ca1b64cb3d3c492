"""Verbs that train: demo, sft. Heavy imports stay inside them."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from trimtab.cli.common import emit, examples, json_option

PROJECTING = ("spf", "per-tensor", "a-gem", "pcgrad", "safegrad")  # act on a conflict, and only then


@click.command(epilog=examples("trimtab demo", "trimtab demo --quick", "trimtab demo --out /tmp/demo --seed 1"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("trimtab-demo"), show_default=True)
@click.option("--quick", is_flag=True, help="Fewer steps and prompts: a look in under three minutes, not evidence.")
@click.option("--seed", default=0, show_default=True, help="Seed of the training data and of training.")
@click.option("--guard", type=click.Choice(["keel", "spf", "mixing"]), default="keel", show_default=True,
              help="The guard to show.")  # fmt: skip
@click.option("--workers", default=None, type=click.IntRange(1),
              help="Models trained and measured side by side (default: cores, at most 2).")  # fmt: skip
@json_option
def demo(out: Path, quick: bool, seed: int, guard: str, workers: int | None, as_json: bool) -> None:
    """See safety lost by ordinary fine-tuning and kept by a guard, on a real model, in minutes on a CPU."""
    from trimtab.demo import run_demo

    result = run_demo(out, quick=quick, seed=seed, guard=guard, workers=workers)
    emit(result.document(), result.lines(), as_json)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=examples(
        "trimtab sft --config recipes/sft_lora.yaml --dataset_name my.jsonl",
        "trimtab sft --model_name_or_path demo --dataset_name my.jsonl --use_peft --output_dir runs/mine",
        "trimtab sft --config my_trl.yaml --guard spf --guard_anchors published --guard_rank 20",
    ),
)
@click.option("--help-all", is_flag=True, help="Every flag, TRL's included.")
@json_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def sft(help_all: bool, as_json: bool, arguments: tuple[str, ...]) -> None:
    """Fine-tune with TRL and keep the model safe: every flag and YAML key of `trl sft`, and these.

    \b
    --guard NAME                keel (default), keel-patient (looks less often while
                                calm), spf (as published), mixing, none;
                                from the literature: per-tensor, alternating, a-gem,
                                pcgrad, safegrad, spard, lisa, asft, safeinstr,
                                constrained, salora, safe-lora, resta
    --guard_base MODEL          asft, safe-lora, resta: the model before alignment
    --guard_anchors SOURCE      bundled, bundled:N (N a side), published, or a JSONL file
    --guard_rank K              spf: singular directions per block (20)
    --guard_refresh_every N     spf: steps between two safety gradients (1)
    --guard_rows N              anchors looked at per step; keel: refusals (5)
    --guard_answer_rows N       keel: answers looked at per step (5)
    --guard_margin X            keel: tolerated drift, nats per token (0.02)
    --guard_decision_tokens N   first tokens of a reply that are watched
    --guard_calm_after N        keel: calm looks in a row before glances suffice (8)
    --guard_calm_rows N         keel: anchors of each side in a glance (2)
    --guard_settle_rounds N     keel: most looks after the last update (24)
    --guard_settle_rows N       keel: anchors of each side in such a look (16)
    --guard_target NAME         keel: distribution (default), words or decision
    --guard_spare true          keel: a correction of one side may not raise the calm side's loss
    --verify_save false         do not reload and check what was saved
    """
    from trimtab.tuning.sft import parse, run

    if help_all:
        parse(["--help"])
    with redirect_stdout(sys.stderr):  # TRL prints its log there
        result = run(arguments)
    lines = [
        f"trained {result.steps} steps in {result.seconds:.0f} s, mean loss {result.train_loss:.3f}",
        f"guard {result.guard}: changed {result.acted} of {result.steps} steps",
        f"saved to {result.output_dir}",
    ]
    if result.guard in PROJECTING and result.steps and not result.acted:
        lines.append(f"warning: {result.guard} found no conflict in any step: this is what plain fine-tuning gives")
    if os.environ.get("RANK", "0") == "0":  # under torchrun and accelerate every process comes here
        emit(vars(result), lines, as_json)
