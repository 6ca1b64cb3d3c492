"""Verbs about judges: judge train, judge calibrate. Heavy imports stay inside them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.common import emit, examples, json_option, write_text

_QUESTION = click.option("--question", type=click.Choice(["refused", "harmful"]), default="refused", show_default=True,
                         help="What the labels say.")  # fmt: skip
_LABEL = click.option("--label", help="Column of the label, where it has another name.")


@click.group(epilog=examples("trimtab judge calibrate rules labelled.csv --out rules.json"))
def judge() -> None:
    """Measure a judge on labelled answers, or train a small one."""


@judge.command(epilog=examples("trimtab judge train xstest.csv more.jsonl --out judges/refusal"))
@click.argument("labelled", nargs=-1, required=True, type=click.Path(path_type=Path))
@_QUESTION
@_LABEL
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the judge.")
@click.option("--encoder", help="Sentence encoder: a folder or a hub id. Default: all-MiniLM-L6-v2.")
@json_option
def train(labelled: tuple[Path, ...], question: str, label: str | None, out: Path, encoder: str | None,
          as_json: bool) -> None:  # fmt: skip
    """Train a classifier judge on LABELLED answers (prompt, answer, label), in seconds."""
    from trimtab.evaluation.classifier import train as fit
    from trimtab.evaluation.labelled import joined, read_labelled

    sets = [read_labelled(path, question, label=label) for path in labelled]  # type: ignore[arg-type]
    made = fit(joined("+".join(one.name for one in sets), sets), encoder=encoder)
    made.save(out)
    facts = {"judge": made.name, "folder": str(out), "trained_on": made.trained_on}
    emit(facts, [f"{made.name} trained on {made.trained_on}", f"use it: --judge classifier={out}"], as_json)


@judge.command(
    epilog=examples(
        "trimtab judge calibrate rules xstest.csv --out rules.json",
        "trimtab judge calibrate classifier=judges/refusal held-out.jsonl --out classifier.json",
        "trimtab compare runs/base runs/new --judge-errors rules.json",
    )
)
@click.argument("name")
@click.argument("labelled", nargs=-1, required=True, type=click.Path(path_type=Path))
@_QUESTION
@_LABEL
@click.option("--out", type=click.Path(path_type=Path), help="Write error rates that `trimtab compare` uses.")
@json_option
def calibrate(name: str, labelled: tuple[Path, ...], question: str, label: str | None, out: Path | None,
              as_json: bool) -> None:  # fmt: skip
    """Measure judge NAME on LABELLED answers and store its error rates.

    \b
    rules                                refusal rules
    classifier=FOLDER                    what `trimtab judge train` wrote
    harmbench, wildguard, llama-guard,   a published checkpoint; NAME@REVISION pins it, NAME=FOLDER[,PROMPT.txt] takes
    strongreject                         a local one
    rubric:MODEL                         any chat model that inspect knows, e.g. rubric:trimtab/demo
    """
    from trimtab.evaluation.calibration import calibrate as measure
    from trimtab.evaluation.labelled import read_labelled
    from trimtab.evaluation.ladder import make_judge

    sets = [read_labelled(path, question, label=label) for path in labelled]  # type: ignore[arg-type]
    found = measure(make_judge(name), sets)
    if out:
        write_text(out, json.dumps(found.document(), indent=1) + "\n")
    emit(found.document(), found.lines(), as_json)
