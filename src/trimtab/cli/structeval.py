"""Verbs for structured output: structeval score, render, generate, report, tasks. Heavy imports stay inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trimtab.cli.common import emit, examples, json_option, write_text

if TYPE_CHECKING:
    from trimtab.structeval.run import Item

F = TypeVar("F", bound=Callable[..., Any])
_PYTHON_RISK = "Run Matplotlib scripts even without bubblewrap: they can read your files and use your network."
_FILE = click.Path(path_type=Path)
_PICTURES = click.Choice(["auto", "render", "recorded", "none"])


@click.group(
    epilog=examples(
        "trimtab structeval score generations.jsonl",
        "trimtab structeval score generations.jsonl --json",
        "trimtab structeval generate demo --split t --limit 200 --max-tokens 512 --out demo.jsonl",
        "trimtab structeval render page.html --format html --out page.png",
        "trimtab structeval report demo.jsonl --html gallery.html",
    )
)
def structeval() -> None:
    """Score structured output: 18 formats, the official StructEval score beside a corrected one."""


def _filters(function: F) -> F:
    for option in (
        click.option("--limit", type=click.IntRange(1), help="At most so many, spread over the task types."),
        click.option("--task", "names", multiple=True, help='Task type ("JSON->YAML") or id; repeatable.'),
        click.option("--format", "formats", multiple=True, help="Output format; repeatable."),
        click.option("--split", "splits", multiple=True, help="t-gen, t-conv, v-gen, v-conv, t, v, gen, conv."),
        click.option("--dataset", help="JSON or JSON Lines file in the data set's schema; default: the hub's."),
    ):
        function = option(function)
    return function


def _scoring(function: F) -> F:
    for option in (
        click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Renderers side by side."),
        click.option("--unsandboxed-python", is_flag=True, help=_PYTHON_RISK),
        click.option("--offline-vqa", is_flag=True, help="Also decide questions by the rendered text."),
        click.option("--judge-url", help="Address of the judge's server, if it speaks OpenAI's protocol."),
        click.option("--judge", help="Vision model for the questions: local/NAME, or inspect's openai/gpt-4.1-mini."),
        click.option("--store", type=_FILE, help="Folder for pictures, kept for the next run; default: beside FILE."),
        click.option("--pictures", type=_PICTURES, default="auto", show_default=True,
                     help="auto: render, unless a row carries the reference's render_score and VQA_score."),
    ):  # fmt: skip
        function = option(function)
    return function


@structeval.command(epilog=examples("trimtab structeval score generations.jsonl --json"))
@click.argument("file", type=_FILE)
@_filters
@_scoring
@json_option
def score(file: Path, as_json: bool, **options: Any) -> None:
    """Score the generations in FILE: JSON or JSON Lines with task_id and generation. No model is needed."""
    from trimtab.structeval import table

    items = _scored(file, **options)
    if as_json:
        emit({"items": [item.document() for item in items], **table.document(items)}, [], as_json)
    else:
        click.echo(table.markdown(items))


@structeval.command(epilog=examples("trimtab structeval report generations.jsonl --format vue --html vue.html"))
@click.argument("file", type=_FILE)
@click.option("--html", type=_FILE, help="Write a gallery: prompts, answers, pictures, missing rules.")
@click.option("--markdown", type=_FILE, help="Write the tables as Markdown.")
@click.option("--title", default="StructEval: answers", show_default=True)
@_filters
@_scoring
@json_option
def report(file: Path, html: Path | None, markdown: Path | None, title: str, as_json: bool, **options: Any) -> None:
    """Tables by quadrant, format and task with intervals, and a gallery page, of the generations in FILE."""
    from trimtab.structeval import gallery, table

    items = _scored(file, **options)
    text = table.markdown(items)
    if html:
        write_text(html, gallery.to_html(items, title=title))
    if markdown:
        write_text(markdown, text)
    emit(table.document(items), [text], as_json)


@structeval.command(epilog=examples("trimtab structeval generate demo --split t-conv --limit 50 --out demo.jsonl"))
@click.argument("model")
@click.option("--out", type=_FILE, required=True, help="JSON Lines file; an interrupted run goes on in it.")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--base-url", help="Address of a server that speaks OpenAI's protocol.")
@click.option(
    "--constrain", is_flag=True, help="Only tokens that lead to a document: JSON, Vega, YAML, TOML, XML, CSV."
)
@_filters
@json_option
def generate(model: str, out: Path, max_tokens: int, temperature: float, batch_size: int, base_url: str | None,
             constrain: bool, as_json: bool, **filters: Any) -> None:  # fmt: skip
    """Let MODEL answer the tasks: a model of trimtab, vllm/NAME, openai/NAME, or NAME with --base-url."""
    from tqdm import tqdm

    from trimtab.structeval import tasks
    from trimtab.structeval.generate import Settings
    from trimtab.structeval.generate import generate as answer

    chosen = tasks.load(filters.pop("dataset"), **filters)
    settings = Settings(max_tokens, temperature, batch_size, base_url=base_url, constrain=constrain)
    with tqdm(total=len(chosen), unit="task", desc=f"asking {model}") as bar:
        done = answer(model, chosen, out, settings, bar.update)
    lines = [f"{done.done} answers in {out}, {done.kept} of them from before, {done.cut} cut at {max_tokens} tokens"]
    emit({"out": str(out), "answers": done.done, "kept": done.kept, "cut": done.cut}, lines, as_json)


@structeval.command(
    epilog=examples(
        "trimtab structeval render 'a -> b' --format mermaid --out graph.png",
        codes=("0 good", "3 not good", "4 its renderer is missing"),
    )
)
@click.argument("file_or_text")
@click.option("--format", "format_name", required=True, help="One of the 18 formats.")
@click.option("--out", type=_FILE, help="Write the picture (PNG) here.")
@click.option("--unsandboxed-python", is_flag=True, help=_PYTHON_RISK)
@json_option
def render(file_or_text: str, format_name: str, out: Path | None, unsandboxed_python: bool, as_json: bool) -> None:
    """Check FILE_OR_TEXT and, where its format renders, draw it. Everything runs in a sandbox, without network."""
    from trimtab.structeval.show import show

    shown = show(file_or_text, format_name, unsandboxed_python=unsandboxed_python)
    if out and shown.png:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_bytes(shown.png)
        partial.replace(out)
    lines = [f"{shown.format}: {shown.status}", *(f"  {error}" for error in shown.errors), shown.text[:2000]]
    lines += [f"picture in {out}"] if out and shown.png else []
    emit(shown.document(str(out) if out and shown.png else None), lines, as_json)
    if shown.status != "ok":
        raise click.exceptions.Exit(4 if shown.status == "unavailable" else 3)


@structeval.command(epilog=examples("trimtab structeval tasks --dataset structeval.jsonl --split t"))
@_filters
@json_option
def tasks(as_json: bool, **filters: Any) -> None:
    """List the data set's task types, and the defects found in its rows."""
    from collections import Counter

    from trimtab.structeval import defects
    from trimtab.structeval import tasks as data

    chosen = data.load(filters.pop("dataset"), **filters)
    names = Counter(task.name for task in chosen)
    found = defects.find(chosen)
    lines = [f"{count:5}  {name}" for name, count in sorted(names.items())]
    lines += ["", f"{len(found)} defects:"] + [f"{count:5}  {kind}" for kind, count in defects.counted(found).items()]
    emit({"tasks": dict(names), "defects": [defect._asdict() for defect in found]}, lines, as_json)


def _scored(file: Path, *, dataset: str | None, pictures: str, judge: str | None, judge_url: str | None,
            store: Path | None, offline_vqa: bool, unsandboxed_python: bool, workers: int,
            **filters: Any) -> list[Item]:  # fmt: skip
    from tqdm import tqdm

    from trimtab.structeval import generations, run, vqa

    found = generations.choose(generations.read(file, dataset=dataset), **filters)
    folder = store or file.with_name(file.name + ".pictures")
    asked = vqa.judge_named(judge, base_url=judge_url, cache=folder / "judge.jsonl") if judge else None
    with tqdm(total=len(found), unit="item", disable=not any(one.task.rendered for one in found)) as bar:
        return run.score_all(found, pictures=pictures, judge=asked, store=folder, workers=workers,  # type: ignore[arg-type]
                             use_offline=offline_vqa, unsandboxed_python=unsandboxed_python,
                             progress=bar.update)  # fmt: skip
