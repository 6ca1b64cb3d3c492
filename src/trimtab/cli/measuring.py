"""Verbs that measure: eval, compare. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.common import emit, examples, json_option, write_text


@click.command(
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


@click.command(
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
