"""The verb geometry: what safety and task gradients look like. Heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.common import emit, examples, json_option


@click.command(
    epilog=examples(
        "trimtab geometry demo --out runs/geometry",
        "trimtab geometry demo --out runs/geometry-sgd --optimizer sgd --lr 0.05 --rule spf --steps 20",
        "trimtab geometry my-org/my-model --data my.jsonl --anchors bundled:32 --out runs/g --json",
    )
)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for JSON, table and pictures.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL task rows; default: the bundled routing task.")
@click.option("--anchors", help="bundled, bundled:N, or a JSONL file; only the side to refuse is used.")
@click.option("--samples", type=click.IntRange(2), default=8, show_default=True, help="Rows of a batch.")
@click.option("--rank", type=click.IntRange(1), default=20, show_default=True, help="Directions of a subspace.")
@click.option("--steps", type=click.IntRange(0), default=24, show_default=True, help="Training steps of the trace.")
@click.option("--batch", type=click.IntRange(2), default=8, show_default=True, help="Task rows of a step.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=2e-5, show_default=True, help="Learning rate of the trace."
)
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option("--rule", type=click.Choice(["none", "spf"]), default="none", show_default=True,
              help="Project every step of the trace by Algorithm 1.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Order of the task rows.")
@json_option
def geometry(model: str, out: Path, data: Path | None, anchors: str | None, samples: int, rank: int, steps: int,
             batch: int, lr: float, optimizer: str, rule: str, seed: int, as_json: bool) -> None:  # fmt: skip
    """Spectra, angles and overlaps of MODEL's safety and task gradients, and the drift along a short training run.

    Nothing is saved of the training. An interrupted run goes on with the part that is missing.
    """
    from trimtab import models
    from trimtab.exact_model import require_exact
    from trimtab.geometry.measure import GeometrySettings
    from trimtab.geometry.rows import read_rows
    from trimtab.geometry.run import run_geometry
    from trimtab.geometry.table import summary_lines
    from trimtab.tuning.options import named_anchors

    require_exact(model, "geometry")
    settings = GeometrySettings(samples, rank, steps, batch, lr, optimizer, rule, seed)
    pool = named_anchors(anchors)  # before the model: a wrong path should not cost a load
    if data:
        read_rows(data)
    found = run_geometry(models.load(model), out, settings, data, pool)
    emit(found.document, [*summary_lines(found.document), f"geometry.json, geometry.md and pictures in {out}"], as_json)
