"""Verbs about activation approximations: vet, harden. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.common import emit, examples, json_option, write_text


@click.command(
    epilog=examples(
        "trimtab vet demo --approx all --out runs/vet",
        "trimtab vet demo --approx teal:0.5 --approx bolt+a8 --limit 50 --out runs/vet",
        "trimtab vet runs/mine --approx seven --axis advbench=harmful.csv --axis over_refusal --out runs/vet",
        "trimtab vet demo --search --out runs/search",
        "trimtab vet --config recipes/vetting/vet_demo.yaml",
    )
)
@click.argument("model", required=False)
@click.option("--config", type=click.Path(path_type=Path), help="Flat YAML with these options; flags override it.")
@click.option("--approx", multiple=True, help="teal:0.5, bolt+a8, several behind ';', seven, or all; repeatable.")
@click.option("--axis", multiple=True, help="As for `trimtab eval`; default: compliance, over_refusal, perplexity.")
@click.option("--perplexity", type=click.Path(), help="Text file (default: a small bundled text).")
@click.option("--accuracy", type=click.Path(), help="JSONL of questions.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for logs, records and the report.")
@click.option("--limit", type=click.IntRange(1), help="At most so many prompts an axis.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=24, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--policy", type=click.Path(path_type=Path), help="Flat YAML: alpha, power, margin, margin.AXIS, ...")
@click.option("--title", default="Activation approximations", show_default=True)
@click.option(
    "--redact/--no-redact", default=True, show_default=True, help="Leave prompts and answers out of the page."
)
@click.option("--search", is_flag=True, help="Instead: the most vulnerable noise, sensitive layers, clusters.")
@click.option("--search-prompts", type=click.IntRange(8), default=48, show_default=True, help="Harmful prompts a step.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Noise seeds of the search.")
@json_option
@click.pass_context
def vet(context: click.Context, /, as_json: bool, **given: Any) -> None:
    """What do cheaper activations do to MODEL's safety and utility?

    Every approximation is compared with the exact model on the same prompts. An interrupted sweep goes on where it
    stopped; more approximations may be added later.
    """
    from trimtab.vetting import plan

    options = _merged(context, given)
    if options["search"]:
        _search(options, as_json)
        return
    from trimtab.approximation.naming import split_list
    from trimtab.comparison import load_policy
    from trimtab.vetting import report as reporting
    from trimtab.vetting.sweep import VetSettings, sweep

    names = split_list(options["approx"] or ["all"])
    out = Path(options["out"])
    rules = load_policy(options["policy"]) if options["policy"] else None
    axes = plan.axes_for(options["axis"], out, perplexity=options["perplexity"], accuracy=options["accuracy"])
    settings = VetSettings(options["model"], axes, options["limit"], options["max_new_tokens"], options["batch_size"])
    base, vetted = sweep(settings, names, out, tell=lambda line: click.echo(line, err=True))
    found = reporting.make_report(base, vetted, rules)
    text = reporting.to_markdown(found)
    write_text(out / "report.md", text)
    if found.comparisons:
        write_text(out / "report.html", reporting.to_page(found, title=options["title"], redact=options["redact"]))
    document = reporting.to_document(found)
    emit(document, [text, f"report: {out / 'report.html'}"], as_json)
    raise click.exceptions.Exit(found.exit_code)


def _search(options: dict[str, Any], as_json: bool) -> None:
    from trimtab.vetting.search import run_search

    found = run_search(
        options["model"],
        Path(options["out"]),
        prompts=options["search_prompts"],
        seeds=options["seeds"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        tell=lambda line: click.echo(line, err=True),
    )
    emit(found.document(), found.lines(), as_json)


def _merged(context: click.Context, given: dict[str, Any]) -> dict[str, Any]:
    """Flags over the YAML file over defaults; MODEL and --out from either."""
    from click.core import ParameterSource

    from trimtab.errors import UsageError
    from trimtab.vetting.plan import read_config

    options = dict(given)
    config = read_config(options.pop("config")) if options.get("config") else {}
    options.pop("config", None)
    for parameter in context.command.params:
        key = parameter.name or ""
        if key not in config:
            continue
        source = context.get_parameter_source(key)
        if source in (ParameterSource.DEFAULT, None) or options.get(key) in (None, ()):
            value = config[key]
            options[key] = tuple(value) if isinstance(value, list) else parameter.type_cast_value(context, value)
    for key, how in (("model", "name it: trimtab vet MODEL"), ("out", "add --out FOLDER")):
        if not options.get(key):
            raise UsageError(f"vet needs {key}", fix=how)
    return options


@click.command(
    epilog=examples(
        "trimtab harden demo --noise noise:up=0.037,down=0.057,layers=0-18 --out runs/hardened",
        "trimtab harden demo --noise teal:0.5 --imitation 1 --cosine 0 --out runs/hardened-teal",
        "trimtab harden demo --noise none --cosine 0 --out runs/plain-dpo",
        "trimtab harden my-model --noise noise:up=0.05 --data preferences.jsonl --out runs/hardened",
    )
)
@click.argument("model")
@click.option(
    "--noise",
    required=True,
    help="What to train under: noise:up=S,down=S,layers=FIRST-LAST (from `vet --search`), the approximation that "
    "you will ship (teal:0.5, a6), or none.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the adapter.")
@click.option("--data", type=click.Path(), help="JSONL: prompt, chosen, rejected, optional harmful.")
@click.option("--pairs", type=click.IntRange(1), default=160, show_default=True, help="Requests of the bundled set.")
@click.option("--two-sided/--one-sided", default=True, show_default=True, help="Innocent twins too; published: one.")
@click.option("--all-layers", is_flag=True, help="Ablation: noise in every layer.")
@click.option("--cosine", type=click.FloatRange(0), default=0.01, show_default=True, help="Weight of the cosine term.")
@click.option(
    "--imitation",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Weight of imitating preferred replies.",
)
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True)
@click.option("--beta", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@json_option
def harden(model: str, out: Path, all_layers: bool, as_json: bool, **given: Any) -> None:
    """Train MODEL to keep its refusals under approximated activations (QuadA); writes an adapter.

    Vet it again afterwards: trimtab vet MODEL?adapter=OUT --approx all --out runs/after
    """
    import sys
    from contextlib import redirect_stdout
    from dataclasses import asdict, replace

    from trimtab.approximation.naming import LayerRange
    from trimtab.errors import UsageError
    from trimtab.vetting.harden import HardenSettings, noise_of
    from trimtab.vetting.harden import harden as train

    noise = noise_of(given["noise"])
    if all_layers and noise is None:
        raise UsageError("--all-layers widens noise", seen=given["noise"], fix="leave it out")
    if all_layers and noise is not None:
        given["noise"] = replace(noise, layers=LayerRange()).label
    settings = HardenSettings(model=model, **given)
    with redirect_stdout(sys.stderr):  # TRL prints its log there
        found = train(settings, out)
    lines = [
        f"hardened {model} against {settings.noise}: {found.steps} steps on {found.rows} preferences, "
        f"mean loss {found.loss:.3f}, {found.seconds:.0f} s",
        f"adapter in {found.folder}; vet it: trimtab vet '{model}?adapter={found.folder}' --approx all --out FOLDER",
    ]
    emit({**asdict(found), "settings": asdict(settings)}, lines, as_json)
