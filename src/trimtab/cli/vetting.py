"""Verbs about activation approximations: vet, harden. Heavy imports stay inside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.common import VERDICTS, emit, examples, json_option, write_text

if TYPE_CHECKING:
    from trimtab.evaluation.runner import AxisSpec

SEARCHED = ("search_prompts", "seeds")  # options of `vet` that only its search reads
NOT_SEARCHED = ("approx", "axis", "perplexity", "accuracy", "limit", "workers", "before", "policy", "title", "redact")


@click.command(
    epilog=examples(
        "trimtab vet demo --approx all --out runs/vet",
        "trimtab vet demo --approx teal:0.5 --approx bolt+a8 --limit 50 --out runs/vet",
        "trimtab vet runs/mine --approx seven --axis advbench=harmful.csv --axis over_refusal --out runs/vet",
        "trimtab vet 'demo?adapter=runs/hardened' --before runs/vet --out runs/vet-hardened",
        "trimtab vet demo --search --out runs/search",
        "trimtab vet --config recipes/vetting/vet_demo.yaml",
        codes=VERDICTS,
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
@click.option("--max-new-tokens", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Approximations measured at once, each by a process with its own copy of the model.  [default: as many as "
    "fit, one a core, at most 4; 1 on an accelerator]",
)
@click.option(
    "--before",
    type=click.Path(path_type=Path),
    help="Folder of a finished vet of the model before hardening, with the same prompts: report both, technique by "
    "technique. Its techniques are the default of --approx.",
)
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
def vet(context: click.Context, /, as_json: bool, **values: Any) -> None:
    """What do cheaper activations do to MODEL's safety and utility?

    Every approximation is compared with the exact model on the same prompts. An interrupted sweep goes on where it
    stopped, and what could not be measured is tried again; more approximations may be added later. A folder of other
    settings or of other weights is refused.
    """
    options, given = _given(context, values)
    if options["search"]:
        _search(options, as_json)
        return
    from trimtab.approximation.naming import split_list
    from trimtab.comparison import load_policy
    from trimtab.exact_model import require_exact
    from trimtab.vetting import before as earlier
    from trimtab.vetting import plan
    from trimtab.vetting import report as reporting
    from trimtab.vetting.sweep import VetSettings, sweep

    names = split_list(options["approx"] or ["all"])
    require_exact(options["model"], "vet", ", use --approx")  # before anything is written
    out = Path(options["out"])
    rules = load_policy(options["policy"]) if options["policy"] else None
    axes = plan.axes_for(options["axis"], out, perplexity=options["perplexity"], accuracy=options["accuracy"])
    _check_length(axes, options["max_new_tokens"], told="max_new_tokens" in given)
    settings = VetSettings(options["model"], axes, options["limit"], options["max_new_tokens"], options["batch_size"])
    held = earlier.read_before(Path(options["before"]), settings, out) if options["before"] else None
    names = names if options["approx"] or held is None else held.names
    base, vetted = sweep(settings, names, out, workers=options["workers"], tell=lambda line: click.echo(line, err=True))
    changes = earlier.make_changes(held, base, vetted) if held is not None else None
    found = reporting.make_report(base, vetted, rules, changes)
    text = reporting.to_markdown(found)
    write_text(out / "report.md", text)
    page = out / "report.html"
    if found.comparisons:
        write_text(page, reporting.to_page(found, title=options["title"], redact=options["redact"]))
        where = f"report: {page}"
    else:
        page.unlink(missing_ok=True)  # an earlier call's, of other approximations
        where = f"report: {out / 'report.md'}; no page, for no approximation could be measured"
    emit(reporting.to_document(found), [text, where], as_json)
    raise click.exceptions.Exit(found.exit_code)


def _check_length(axes: Sequence[AxisSpec], tokens: int, *, told: bool) -> None:
    """Refuse to cut off answers that end in a number at a length that nobody asked for; else say so."""
    from trimtab.errors import UsageError
    from trimtab.vetting.plan import cut_off

    if not (names := cut_off(axes, tokens)):
        return
    if not told:
        fix = f"add --max-new-tokens 256, say, or --max-new-tokens {tokens} if that is meant"
        seen = f"{', '.join(names)}: {tokens} tokens by default"
        raise UsageError("answers that end in a number would be cut off before it", seen=seen, fix=fix)
    click.echo(f"{', '.join(names)}: answers of {tokens} tokens, most are cut off before their number", err=True)


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


def _given(context: click.Context, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Flags over the YAML file over defaults; MODEL and --out from either; nothing that would be ignored."""
    from trimtab.cli.options import merged, refuse_ignored
    from trimtab.errors import UsageError
    from trimtab.vetting.plan import read_config

    path = values.pop("config", None)
    options, given = merged(context, values, read_config(path) if path else {}, path)
    for key, how in (("model", "name it: trimtab vet MODEL"), ("out", "add --out FOLDER")):
        if not options.get(key):
            raise UsageError(f"vet needs {key}", fix=how)
    if options["search"]:
        refuse_ignored(context, given, NOT_SEARCHED, "with --search", "leave that out, or leave --search out")
    else:
        refuse_ignored(context, given, SEARCHED, "without --search", "leave that out, or add --search")
    return options, given


@click.command(
    epilog=examples(
        "trimtab harden demo --out runs/hardened",
        "trimtab harden demo --noise teal:0.5 --out runs/hardened-for-teal",
        "trimtab harden demo --method rotate --out runs/rotated && trimtab harden runs/rotated --out runs/hardened",
        "trimtab harden demo --method quada --noise noise:up=0.037,down=0.057,layers=0-18 --out runs/quada",
        "trimtab harden demo --method quada --noise none --cosine 0 --out runs/plain-dpo",
        "trimtab harden my-model --method quada --noise noise:up=0.05 --data preferences.jsonl --out runs/quada",
    )
)
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice(["distill", "rotate", "quada"]),
    default="distill",
    show_default=True,
    help="distill: learn to say under the approximation what the model says without it. rotate: the same function in "
    "coordinates without outliers, no training; for rounding, and before distill. quada: as published.",
)
@click.option(
    "--noise",
    multiple=True,
    help="What to train under: the approximation that you will ship (teal:0.5, a6), noise:up=S,down=S,"
    "layers=FIRST-LAST (from `vet --search`), or none (quada). distill: several take turns; default: TEAL and CATS "
    "50 %, 6, 5 and 4 bits, SmoothQuant and OmniQuant at 4.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the adapter (rotate: for a model)."
)
@click.option("--pairs", type=click.IntRange(1), help="Bundled requests.  [default: 400 (distill), 160 (quada)]")
@click.option("--steps", type=click.IntRange(1), help="[default: 180 (distill), 40 (quada)]")
@click.option("--batch-size", type=click.IntRange(1), help="Rows; distill: harmful requests.  [default: 8]")
@click.option("--innocent-rows", type=click.IntRange(1), help="distill: innocent requests in a step.  [default: 8]")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: 1e-3 (distill), 2e-4 (quada)]"
)
@click.option("--rank", type=click.IntRange(1), help="[default: 16]")
@click.option("--seed", type=click.IntRange(0), help="[default: 0]")
@click.option("--bf16/--fp32", default=None, help="distill: train in bfloat16 or not; default: where it is native.")
@click.option("--texts", type=click.IntRange(1), help="distill: ordinary texts to be held.  [default: 96]")
@click.option("--reply-tokens", type=click.IntRange(2), help="distill: first tokens compared.  [default: 8]")
@click.option("--clean", type=click.FloatRange(0), help="distill: weight of holding the exact model.  [default: 1.5]")
@click.option(
    "--drift-bound",
    type=click.FloatRange(0, min_open=True),
    help="distill: how far the exact model may drift, nats a token; the adapter is made smaller until that holds.  "
    "[default: 0.045]",
)
@click.option("--data", type=click.Path(), help="quada: JSONL with prompt, chosen, rejected, optional harmful.")
@click.option("--two-sided/--one-sided", default=None, help="quada: innocent twins too (default); published: one.")
@click.option("--all-layers", is_flag=True, default=None, help="quada, ablation: noise in every layer.")
@click.option("--cosine", type=click.FloatRange(0), help="quada: weight of the cosine term.  [default: 0.01]")
@click.option("--imitation", type=click.FloatRange(0), help="quada: weight of imitating replies.  [default: 0]")
@click.option("--beta", type=click.FloatRange(0, min_open=True), help="quada: DPO's beta.  [default: 0.1]")
@json_option
@click.pass_context
def harden(
    context: click.Context,
    /,
    model: str,
    method: str,
    out: Path,
    noise: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Make MODEL keep its refusals under approximated activations; writes an adapter (rotate: a model).

    Vet it again afterwards: trimtab vet MODEL?adapter=OUT --approx all --out runs/after
    """
    import sys
    from contextlib import redirect_stdout
    from dataclasses import asdict

    given = {name: value for name, value in options.items() if value is not None}
    _refuse_unread(context, method, given | ({"noise": noise} if noise else {}))
    if method == "rotate":
        _rotate(model, out, given, as_json)
        return
    with redirect_stdout(sys.stderr):  # TRL prints its log there
        found, settings = (_distill if method == "distill" else _quada)(model, out, noise, given)
    # what was trained under: --all-layers changes what was typed
    against = settings.noise if method == "quada" else ", ".join(dict.fromkeys(settings.noise))
    size = found.size
    held = (
        [f"exact, {size.drift:.3f} nats a token from {model}, at {size.scale:.0%} of its trained size"] if size else []
    )
    name = f"{model}{'&' if '?' in model else '?'}adapter={found.folder}"
    lines = [
        f"hardened {model} against {against}: {found.steps} steps on {found.rows} rows, mean loss {found.loss:.3f}, "
        f"{found.seconds:.0f} s",
        *held,
        f"adapter in {found.folder}; vet it: trimtab vet '{name}' --approx all --out FOLDER",
    ]
    emit({**asdict(found), "method": method, "settings": asdict(settings)}, lines, as_json)


def _rotate(model: str, out: Path, given: dict[str, Any], as_json: bool) -> None:
    import sys
    from contextlib import redirect_stdout
    from dataclasses import asdict

    from trimtab.vetting.rotate import RotateSettings, rotate_model

    settings = RotateSettings(model=model, **given)
    with redirect_stdout(sys.stderr):
        found = rotate_model(settings, out)
    untied = ", with an output layer of its own (it was the embedding's)" if found.untied else ""
    lines = [
        f"rotated {model}: the same function, logits within {found.gap:.1g} of the largest, {found.seconds:.0f} s",
        f"error of the down projections under 4 bits: {found.error_before:.0%}, scaled {found.error_after:.0%}",
        f"model in {found.folder}, {found.size / 2**20:.0f} MiB{untied}",
        f"vet it: trimtab vet {found.folder} --approx all --out FOLDER; train it: trimtab harden {found.folder}",
    ]
    emit({**asdict(found), "method": "rotate", "settings": asdict(settings)}, lines, as_json)


def _distill(model: str, out: Path, noise: tuple[str, ...], given: dict[str, Any]) -> tuple[Any, Any]:
    from trimtab.vetting.distill import DistillSettings, harden_by_distillation

    if noise:
        given["noise"] = noise
    settings = DistillSettings(model=model, **given)
    return harden_by_distillation(settings, out), settings


def _quada(model: str, out: Path, noise: tuple[str, ...], given: dict[str, Any]) -> tuple[Any, Any]:
    from dataclasses import replace

    from trimtab.approximation.entries import LayerRange
    from trimtab.errors import UsageError
    from trimtab.vetting.harden import HardenSettings, noise_of
    from trimtab.vetting.harden import harden as train

    if len(noise) != 1:
        fix = "name one with --noise, or take --method distill"
        raise UsageError("quada trains under one approximation", seen=noise, fix=fix)
    name = noise[0]
    if given.pop("all_layers", False):
        found = noise_of(name)
        if found is None:
            raise UsageError("--all-layers widens noise", seen=name, fix="leave it out")
        name = replace(found, layers=LayerRange()).label
    settings = HardenSettings(model=model, noise=name, **given)
    return train(settings, out), settings


def _refuse_unread(context: click.Context, method: str, given: dict[str, Any]) -> None:
    """Refuse options of the other method, and those of bundled rows beside a file of rows."""
    from trimtab.cli.options import merged, refuse_ignored

    _, said = merged(context, given, {}, None)
    refuse_ignored(context, said, given.keys() - _read_by(method), f"with --method {method}", "leave that out")
    if "data" in given:
        fix = "leave that out: the rows of the file are all that is trained on"
        refuse_ignored(context, said, ("pairs", "two_sided"), "with --data", fix)


def _read_by(method: str) -> set[str]:
    from dataclasses import fields

    if method == "rotate":
        from trimtab.vetting.rotate import RotateSettings

        return {field.name for field in fields(RotateSettings)}
    if method == "distill":
        from trimtab.vetting.distill import DistillSettings

        return {field.name for field in fields(DistillSettings)}
    from trimtab.vetting.harden import HardenSettings

    return {field.name for field in fields(HardenSettings)} | {"all_layers"}
