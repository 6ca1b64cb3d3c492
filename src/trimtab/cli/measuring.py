"""Verbs that measure: eval, compare, plan. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.common import VERDICTS, emit, examples, json_option, write_text


@click.command(
    "eval",
    epilog=examples(
        "trimtab eval demo --out runs/demo",
        "trimtab eval runs/mine --axis compliance --axis over_refusal --axis accuracy=task.jsonl --out runs/mine-eval",
        "trimtab eval demo --axis advbench=harmful_behaviors.csv --axis xstest-safe=xstest_prompts.csv --out runs/d",
        "trimtab eval demo --axis jailbreak:prefill --axis jailbreak:template=templates/ --out runs/attacked",
        "trimtab eval demo --axis accuracy=gsm8k.jsonl --match gsm8k --max-new-tokens 256 --out runs/maths",
        "trimtab eval demo --axis choice=mmlu/test --axis 'rouge=dialogues.jsonl?which=rouge1' --out runs/utility",
        "trimtab eval demo --axis lm_eval:arc_easy --axis 'perplexity=wiki.txt?window_chars=4000' --out runs/more",
        "trimtab eval demo --judge classifier=judges/refusal --seeds 3 --temperature 0.7 --out d",
    ),
)
@click.argument("model")
@click.option("--axis", "axes", multiple=True, help="KIND, KIND:DATASET, DATASET=FILE or KIND=FILE; repeatable. Kinds: "
              "compliance, over_refusal, jailbreak:METHOD (prefill, many-shot, past-tense, template=FILE, crescendo, "
              "gcg), accuracy, accuracy=FILE, choice=FILE, rouge=FILE, lm_eval:TASK, perplexity=FILE, structeval. "
              "Settings of one axis: AXIS?key=value&... with match, which, window_chars, revision, split, "
              "limit.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for logs and results.json.")
@click.option("--match", type=click.Choice(["choice", "exact", "number", "gsm8k"]),
              help="Of accuracy=FILE: the label, the whole text, the last number, the number behind ####.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts an axis.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="Prompts in a pass.  [default: as many as fit, 64 at most]")
@click.option("--chat-template", type=click.Path(), help="Jinja file, where the tokenizer has none.")
@click.option(
    "--judge",
    default="rules",
    show_default=True,
    help="Of compliance and jailbreaks: rules, "
    "classifier=FOLDER, harmbench, wildguard, llama-guard, strongreject, rubric:MODEL.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Answers to each prompt.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="With --seeds.")
@click.option("--attacker", help="Model that leads jailbreak:crescendo, e.g. trimtab/demo or openai/NAME.")
@json_option
def evaluate(model: str, axes: tuple[str, ...], out: Path, match: str | None, limit: int | None,
             max_new_tokens: int, batch_size: int | None, chat_template: str | None, judge: str, seeds: int,
             temperature: float, attacker: str | None, as_json: bool) -> None:  # fmt: skip
    """Measure MODEL on both sides of safety and on utility.

    Without --axis: compliance and over-refusal on the bundled prompts. An interrupted run goes on where it stopped.
    """
    from trimtab import models
    from trimtab.evaluation.axes import AxisSpec, with_match
    from trimtab.evaluation.ladder import check_name
    from trimtab.evaluation.runner import check_options
    from trimtab.evaluation.runner import evaluate as measure
    from trimtab.evaluation.terminal import document, lines

    specs = [AxisSpec.parse(axis) for axis in axes] or None
    if match:
        specs = with_match(specs or [], match)
    if specs is not None:
        for spec in specs:
            spec.prompts()  # a wrong path should not cost a model load
    check_options(specs or [], seeds, temperature, attacker)
    check_name(judge)
    loaded = models.load(model, chat_template=chat_template)
    run = measure(loaded, specs, out=out, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size,
                  judge=judge, seeds=seeds, temperature=temperature, attacker=attacker)  # fmt: skip
    emit(document(run), [*lines(run), f"logs and results.json in {out}"], as_json)


@click.command(
    epilog=examples(
        "trimtab compare runs/base runs/new",
        "trimtab compare runs/base runs/new --html report.html --policy policy.yaml && echo release",
        codes=VERDICTS,
    )
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidates", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--policy", type=click.Path(path_type=Path), help="Flat YAML: alpha, power, margin, margin.AXIS, ...")
@click.option("--html", type=click.Path(path_type=Path), help="Write one self-contained page.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write Markdown.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML, for a CI system.")
@click.option("--sarif", type=click.Path(path_type=Path), help="Write SARIF, for code scanning.")
@click.option("--model-card", type=click.Path(path_type=Path), help="Put a block into this README (made if absent).")
@click.option(
    "--eval-results",
    type=click.Path(path_type=Path),
    help="Folder of a model repository: write the candidate's hub results into its .eval_results.",
)
@click.option(
    "--judge-errors",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Error rates from `trimtab judge calibrate`; axes of that judge are corrected by them. Repeatable.",
)
@click.option(
    "--human-labels",
    type=click.Path(path_type=Path),
    help="People's labels of some items (columns axis, id, base, candidate): prediction-powered.",
)
@click.option("--title", default="Safety and utility, before and after", show_default=True)
@click.option("--redact", is_flag=True, help="Leave prompts, answers and template lines out.")
@json_option
def compare(base: Path, candidates: tuple[Path, ...], policy: Path | None, html: Path | None, markdown: Path | None,
            junit: Path | None, sarif: Path | None, model_card: Path | None, eval_results: Path | None,
            judge_errors: tuple[Path, ...], human_labels: Path | None, title: str, redact: bool,
            as_json: bool) -> None:  # fmt: skip
    """Did the change from BASE to CANDIDATES (folders written by `trimtab eval`) make the model worse?

    Only --html and --json hold prompts and answers, and neither with --redact. Nothing is sent anywhere.
    """
    from trimtab import reports
    from trimtab.comparison import EXIT_CODES as CODES
    from trimtab.comparison import compare as judge_change
    from trimtab.comparison import load_policy, worst
    from trimtab.evaluation.calibration import read_errors, read_human_labels
    from trimtab.evaluation.catalogue import CATALOGUE
    from trimtab.evaluation.logs import read_run

    rules = load_policy(policy) if policy else None
    rates = [read_errors(path) for path in judge_errors]
    people = read_human_labels(human_labels) if human_labels else None
    reference, changed = read_run(base), [read_run(folder) for folder in candidates]
    found = [judge_change(reference, one, rules, judge_errors=rates, human_labels=people) for one in changed]
    text = reports.to_markdown(found, redact=redact)
    if html:
        write_text(html, reports.to_html(found, title=title, redact=redact))
    if markdown:
        write_text(markdown, text)
    if junit:
        write_text(junit, reports.to_junit(found))
    if sarif:
        write_text(sarif, reports.to_sarif(found, location=str(policy or base)))
    if model_card:
        card = model_card.read_text(encoding="utf-8") if model_card.exists() else ""
        write_text(model_card, reports.with_block(card, reports.model_card_block(found)))
    if eval_results:
        hubs = {name: source.hub for name, source in CATALOGUE.items() if source.hub}
        reports.write_eval_results(changed[0], hubs, eval_results)
    click.echo(reports.to_json(found, redact=redact) if as_json else text)
    raise click.exceptions.Exit(CODES[worst([one.verdict for one in found])])


@click.command(
    epilog=examples(
        "trimtab plan --margin 0.05 --rate 0.1 --flips 0.05 --axes 3",
        "trimtab plan --margin 0.02 --judge-errors rules.json",
    )
)
@click.option("--margin", type=float, default=0.05, show_default=True, help="How much worse is tolerated (a share).")
@click.option("--worsening", type=float, help="True worsening that must raise the alarm.  [default: twice the margin]")
@click.option("--rate", type=float, default=0.1, show_default=True, help="Rate of the event in the base.")
@click.option("--flips", type=float, default=0.05, show_default=True, help="Share of items that change anyway.")
@click.option("--axes", type=click.IntRange(1), default=3, show_default=True, help="Axes compared together.")
@click.option("--alpha", type=float, default=0.05, show_default=True)
@click.option("--power", type=float, default=0.8, show_default=True)
@click.option("--judge-errors", type=click.Path(path_type=Path), help="Error rates from `trimtab judge calibrate`.")
@click.option("--axis", default="compliance", show_default=True, help="With --judge-errors: what is measured.")
@click.option("--per-cluster", type=float, default=1.0, show_default=True, help="Prompts that resemble each other.")
@click.option("--similarity", type=float, default=0.0, show_default=True, help="Correlation of their changes.")
@json_option
def plan(margin: float, worsening: float | None, rate: float, flips: float, axes: int, alpha: float, power: float,
         judge_errors: Path | None, axis: str, per_cluster: float, similarity: float,
         as_json: bool) -> None:  # fmt: skip
    """How many prompts does a margin need? Answered before anything is run."""
    from dataclasses import asdict

    from trimtab.comparison.planning import Assumptions
    from trimtab.comparison.planning import plan as make_plan
    from trimtab.errors import UsageError
    from trimtab.evaluation.calibration import read_errors

    youden = 1.0
    if judge_errors:
        rates = read_errors(judge_errors).for_axis(axis)
        if rates is None or rates.youden <= 0.0:
            raise UsageError(
                "those error rates say nothing about that axis",
                seen=f"{judge_errors}, {axis}",
                fix="name the axis that the judge was calibrated for, or leave --judge-errors out",
            )
        youden = rates.youden
    found = make_plan(Assumptions(margin, rate, flips, axes, alpha, power, youden, per_cluster, similarity, worsening))
    lines = [
        f"to pass when nothing changed:        {found.to_pass:,} prompts an axis (margin {100 * margin:g} points)",
        f"to raise the alarm for a worsening:  {found.to_alarm:,} prompts an axis "
        f"({100 * found.assumptions.alarming:g} points)",
        f"so measure {found.pairs:,} prompts an axis, with {100 * power:g} % power, alpha {alpha:g} over {axes} axes",
    ]
    document = {"to_pass": found.to_pass, "to_alarm": found.to_alarm, "pairs": found.pairs,
                "assumptions": asdict(found.assumptions)}  # fmt: skip
    emit(document, lines, as_json)
