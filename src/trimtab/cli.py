"""The command line: parse, call one function, print. Heavy imports stay inside the verbs.

Exit codes: 0 pass, 1 usage, 2 could not run, 3 regression, 4 an axis unmeasured, 5 not enough evidence.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import click

from trimtab import __version__
from trimtab.errors import TrimtabError

F = TypeVar("F", bound=Callable[..., Any])
EXIT_CODES = "Exit codes: 0 pass, 1 usage, 2 could not run, 3 regression, 4 an axis unmeasured, 5 not enough evidence."


def main() -> None:
    """Entry point of the ``trimtab`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = trimtab.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _fail("interrupted\n  fix:  repeat the command to go on; for sft add --resume_from_checkpoint true", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 1
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\n  fix:  see `{context.command_path} --help`" if context else ""
        code = _fail(error.format_message() + hint, 1)
    except TrimtabError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:  # a full disk, a missing permission: no stack trace helps the user there
        where = f"\n  seen: {error.filename}" if error.filename else ""
        code = _fail(f"{error.strerror or error}{where}\n  fix:  free space or check permissions, then repeat", 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(f"trimtab: {message}", err=True)
    return code


def examples(*lines: str) -> str:
    """A help epilogue that click does not re-wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) + f"\n\n{EXIT_CODES}"


def json_option(function: F) -> F:
    """``--json``: one document on standard output, everything else on standard error."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")(function)


def emit(document: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    click.echo(json.dumps(document, indent=1) if as_json else "\n".join(lines))


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "trimtab demo",
        "trimtab sft --config recipes/sft_lora.yaml --dataset_name my.jsonl",
        "trimtab compare runs/base runs/new",
    ),
)
@click.version_option(__version__, prog_name="trimtab")
def trimtab() -> None:
    """Keep a language model safe while you change it.

    A model is named the same way in every verb: a hub id, a local folder, a GGUF file, "demo" (an embedded aligned 135M
    model), each optionally with an adapter: NAME?adapter=FOLDER
    """


@trimtab.command(epilog=examples("trimtab demo", "trimtab demo --quick", "trimtab demo --out /tmp/demo --seed 1"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("trimtab-demo"), show_default=True)
@click.option("--quick", is_flag=True, help="Fewer steps and prompts: a look in under three minutes, not evidence.")
@click.option("--seed", default=0, show_default=True, help="Seed of the training data and of training.")
@click.option("--guard", default="keel", show_default=True, help="The guard to show: keel, spf or mixing.")
@click.option(
    "--workers", default=None, type=int, help="Models trained and measured side by side (default: cores, at most 2)."
)
@json_option
def demo(out: Path, quick: bool, seed: int, guard: str, workers: int | None, as_json: bool) -> None:
    """See safety lost by ordinary fine-tuning and kept by a guard, on a real model, in minutes on a CPU."""
    from trimtab.demo import run_demo

    result = run_demo(out, quick=quick, seed=seed, guard=guard, workers=workers)
    emit(result.document(), result.lines(), as_json)


@trimtab.command(
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
    --guard NAME                keel (default), spf (as published), mixing, none
    --guard_anchors SOURCE      bundled, bundled:N (N a side), published, or a JSONL file
    --guard_rank K              spf: singular directions per block (20)
    --guard_refresh_every N     spf: steps between two safety gradients (1)
    --guard_rows N              anchors looked at per step; keel: refusals (3)
    --guard_answer_rows N       keel: answers looked at per step (5)
    --guard_margin X            keel: tolerated drift, nats per token
    --guard_decision_tokens N   first tokens of a reply that are watched
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
    emit(vars(result), lines, as_json)


@trimtab.command(
    "eval",
    epilog=examples(
        "trimtab eval demo --out runs/demo",
        "trimtab eval runs/mine --axis compliance --axis over_refusal --axis accuracy=task.jsonl --out runs/mine-eval",
        "trimtab eval demo --axis advbench=harmful_behaviors.csv --axis xstest-safe=xstest_prompts.csv --out runs/d",
    ),
)
@click.argument("model")
@click.option("--axis", "axes", multiple=True, help="KIND, KIND:DATASET, DATASET=FILE or KIND=FILE; repeatable. Kinds: "
              "compliance, over_refusal, accuracy, perplexity.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for logs and results.json.")
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts an axis.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--chat-template", type=click.Path(), help="Jinja file, where the tokenizer has none.")
@json_option
def evaluate(model: str, axes: tuple[str, ...], out: Path, limit: int | None, max_new_tokens: int, batch_size: int,
             chat_template: str | None, as_json: bool) -> None:  # fmt: skip
    """Measure MODEL on both sides of safety and on utility.

    Without --axis: compliance and over-refusal on the bundled prompts. An interrupted run goes on where it stopped.
    """
    from trimtab import models
    from trimtab.evaluation.runner import AxisSpec
    from trimtab.evaluation.runner import evaluate as measure
    from trimtab.evaluation.terminal import document, lines

    specs = [AxisSpec.parse(axis) for axis in axes] or None
    if specs is not None:
        for spec in specs:
            spec.prompts()  # a wrong path should not cost a model load
    loaded = models.load(model, chat_template=chat_template)
    run = measure(loaded, specs, out=out, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    emit(document(run), [*lines(run), f"logs and results.json in {out}"], as_json)


@trimtab.command(
    epilog=examples(
        "trimtab compare runs/base runs/new",
        "trimtab compare runs/base runs/new --html report.html --policy policy.yaml && echo release",
    )
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidates", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--policy", type=click.Path(path_type=Path), help="Flat YAML: alpha, power, margin, margin.AXIS, ...")
@click.option("--html", type=click.Path(path_type=Path), help="Write one self-contained page.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write Markdown.")
@click.option("--title", default="Safety and utility, before and after", show_default=True)
@click.option("--redact", is_flag=True, help="Leave prompts and answers out of page and JSON.")
@json_option
def compare(base: Path, candidates: tuple[Path, ...], policy: Path | None, html: Path | None, markdown: Path | None,
            title: str, redact: bool, as_json: bool) -> None:  # fmt: skip
    """Did the change from BASE to CANDIDATES (folders written by `trimtab eval`) make the model worse?"""
    from trimtab import reports
    from trimtab.comparison import EXIT_CODES as CODES
    from trimtab.comparison import compare as judge_change
    from trimtab.comparison import load_policy, worst
    from trimtab.evaluation.logs import read_run

    rules = load_policy(policy) if policy else None
    reference = read_run(base)
    found = [judge_change(reference, read_run(folder), rules) for folder in candidates]
    text = reports.to_markdown(found)
    if html:
        write_text(html, reports.to_html(found, title=title, redact=redact))
    if markdown:
        write_text(markdown, text)
    click.echo(reports.to_json(found, redact=redact) if as_json else text)
    raise click.exceptions.Exit(CODES[worst([one.verdict for one in found])])


@trimtab.command(epilog=examples("trimtab doctor", "trimtab doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and what to install for the rest."""
    from trimtab.doctor import examine

    checks = examine()
    emit({"checks": [vars(check) for check in checks]}, [check.line() for check in checks], as_json)


@trimtab.command(epilog=examples("trimtab convert old-checkpoint safe-checkpoint", "trimtab convert m.gguf folder"))
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@json_option
def convert(source: str, target: Path, as_json: bool) -> None:
    """Write SOURCE (a pickle checkpoint, a GGUF file, or an adapter to merge) as a safetensors folder.

    A pickle is read with PyTorch's restricted loader, which runs no code from the file.
    """
    from trimtab.convert import convert as write

    size = write(source, target)
    emit({"target": str(target), "bytes": size}, [f"wrote {target} ({size / 1e6:.0f} MB)"], as_json)


def write_text(path: Path, text: str) -> None:
    """Write beside and move, so that a reader or a full disk never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
