"""The verb that repairs: patch. Heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.common import emit, examples, json_option, write_text


@click.command(
    epilog=examples(
        "trimtab patch runs/mine --out runs/mine-patched",
        "trimtab patch my-model --aligned the-model-it-came-from --out patched --merged",
        "trimtab patch runs/mine --keep my_prompts.jsonl --axis compliance --axis over_refusal --axis accuracy:tickets "
        "--out runs/p",
        "trimtab patch runs/mine --method published --out runs/one-shot --force",
        codes=("0 saved, or nothing to repair", "3 refused to save"),
    )
)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder; appears only when accepted.")
@click.option("--method", type=click.Choice(["two-sided", "published", "low-rank"]), default="two-sided",
              show_default=True, help="Ours; one-shot training as published; its closed form.")  # fmt: skip
@click.option("--aligned", default="auto", show_default=True, help="The aligned model it came from; auto: the base of "
              "an adapter, where it refuses; none: bundled refusals.")  # fmt: skip
@click.option("--sample", help="general (the published one), general-short, or a JSONL file of anchors.")
@click.option("--select", type=click.Choice(["general", "bilevel", "exhaustive"]), default="general",
              show_default=True, help="How the sample is chosen from the pool; the last two need the aligned model "
              "and cost minutes.")  # fmt: skip
@click.option("--keep", type=click.Path(path_type=Path), help="Prompts whose answers should stay: JSONL, CSV or TXT; "
              "no answers needed.")  # fmt: skip
@click.option("--samples", help="two-sided: how many refusals to try, in this order (1,6,84).")
@click.option("--merged", is_flag=True, help="Write a whole model instead of an adapter.")
@click.option("--full", is_flag=True, help="published only: train all parameters; writes a whole model.")
@click.option("--steps", type=click.IntRange(1), help="published: 10. two-sided: most steps of the last rung (36).")
@click.option("--learning-rate", type=float, help="published: 2e-5 full, 1e-3 adapter. two-sided: AdamW at "
              "this rate; default: steps that need none, where an aligned model is known.")  # fmt: skip
@click.option("--step", type=float, help="low-rank: alpha times eta (2e-5).")
@click.option("--rank", type=click.IntRange(1), help="Of the adapter (8); low-rank: k (20).")
@click.option("--system", help="System message of the samples; default: the chat template's own.")
@click.option("--axis", "axes", multiple=True, help="Verified axes as in `trimtab eval`; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=84, show_default=True, help="Verified prompts an axis.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=12, show_default=True, help="Of the verification.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Save what the verification refuses; repair what is not broken. Recorded.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as one page.")
@click.option("--chat-template", type=click.Path(), help="Jinja file, where the tokenizer has none.")
@json_option
def patch(model: str, out: Path, sample: str | None, keep: Path | None, samples: str | None, axes: tuple[str, ...],
          html: Path | None, chat_template: str | None, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Repair MODEL, which fine-tuning has made comply with everything, using one safety example (or a handful).

    Measures before and after on prompts that the repair never saw, and saves nothing that changed nothing or made a
    side worse. Exit code 0: saved, or the model was not broken; 3: refused.
    """
    from trimtab import reports
    from trimtab.patching.job import run
    from trimtab.patching.options import settings_from

    settings = settings_from(sample=sample, keep=keep, samples=samples, axes=axes, **options)
    result = run(model, out, settings, say=lambda line: click.echo(line, err=True), chat_template=chat_template)
    verdict = result.verdict
    if html and verdict is not None:
        write_text(html, reports.to_html([verdict.comparison], title=result.title))
    document = {**vars(result), "verdict": None, "comparison": None}
    lines = list(result.lines())
    if verdict is not None:
        document["comparison"] = reports.to_document([verdict.comparison], redact=True)
        lines = [reports.to_markdown([verdict.comparison]), *lines]
    document.pop("verdict")
    emit(document, lines, as_json)
    raise click.exceptions.Exit(result.exit_code)
