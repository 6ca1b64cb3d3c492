"""Measure the geometry of a model: spectra, overlaps, and the trace of cosine and drift along a training run.

Covered: the three measurements as plain dictionaries ready for JSON. Not covered: tables (``table.py``), pictures
(``charts.py``), files and resume (``run.py``).
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.gradients.analysis import (
    block_basis,
    bound,
    cosine,
    effective_rank,
    energy_curve,
    matrix_blocks,
    place_of,
    spectra,
    subspace_overlap,
)
from trimtab.gradients.factors import SafetyGradient, safety_gradient
from trimtab.gradients.subspace import Side
from trimtab.gradients.surgery import spf_algorithm1
from trimtab.tuning.guard import quiet
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor

RANKS = (1, 2, 5, 10, 20)
SIDES: tuple[Side, ...] = ("left", "right")


@dataclass(frozen=True)
class GeometrySettings:
    """How to measure.

    Attributes:
        samples: rows of a batch, and how many single samples are compared with their batch.
        rank: k of subspaces and of the bound.
        steps: of training for the trace; 0 leaves the trace out.
        batch: task rows of a step.
        lr: learning rate.
        optimizer: "adamw" or "sgd" (the bound speaks of SGD only).
        rule: "none" or "spf" (Algorithm 1 on every step).
        seed: order of the task rows.
    """

    samples: int = 8
    rank: int = 20
    steps: int = 24
    batch: int = 8
    lr: float = 2e-5
    optimizer: str = "adamw"
    rule: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd") or self.rule not in ("none", "spf"):
            raise UsageError("unknown choice", seen=f"{self.optimizer}, {self.rule}", fix="adamw or sgd; none or spf")
        if min(self.samples, self.batch) < 2 or self.rank < 1 or self.steps < 0:
            raise UsageError("samples and batch are at least 2, rank 1, steps 0", seen=self, fix="raise what is below")
        if not 0.0 < self.lr < math.inf:
            raise UsageError("a learning rate is above 0 and finite", seen=self.lr, fix="give one such as 2e-5")


class Subjects(NamedTuple):
    """What gradients are taken of: ``published`` the paper's one sample, ``refuse`` and ``task`` rows."""

    published: list[TokenisedAnchor]
    refuse: list[TokenisedAnchor]
    task: list[TokenisedAnchor]


def gradient_of(reader: AnchorReader, rows: Sequence[TokenisedAnchor]) -> SafetyGradient:
    """The gradient of the rows' mean loss as factors; dropout and checkpointing inactive."""
    with quiet(reader.model):
        return safety_gradient(reader.model, lambda: reader.losses(rows).mean())


def measure_spectra(reader: AnchorReader, subjects: Subjects, samples: int) -> dict[str, Any]:
    """Energy ratios by layer of four gradients: one safety sample, a safety batch, one task row, a task batch.

    A gradient's rank is at most its number of tokens, so the honest comparison is sample with sample and batch with
    batch; tokens are given.
    """
    sets = {
        "published sample": subjects.published[:1],
        "safety sample": subjects.refuse[:1],
        "safety batch": subjects.refuse[:samples],
        "task sample": subjects.task[:1],
        "task batch": subjects.task[:samples],
    }
    return {label: _spectrum_of(gradient_of(reader, rows), rows) for label, rows in sets.items() if rows}


def measure_overlaps(reader: AnchorReader, subjects: Subjects, settings: GeometrySettings) -> dict[str, Any]:
    """Overlap of single samples with a batch that does not hold them, for three pairs, on both sides.

    ``task sample, safety batch`` is the control: if it is as high as ``safety sample, safety batch``, the overlap says
    nothing about safety.
    """
    half = settings.samples
    singles = {
        "safety": [_bases(reader, [row], settings.rank) for row in subjects.refuse[half : half + 4]],
        "task": [_bases(reader, [row], settings.rank) for row in subjects.task[half : half + 4]],
        "published": [_bases(reader, subjects.published[:1], settings.rank)] if subjects.published else [],
    }
    batches = {
        "safety": _bases(reader, subjects.refuse[:half], settings.rank),
        "task": _bases(reader, subjects.task[:half], settings.rank),
    }
    pairs = [("safety", "safety"), ("published", "safety"), ("task", "task"), ("task", "safety"), ("safety", "task")]
    found: dict[str, Any] = {}
    for one, many in pairs:
        for side in SIDES:
            for rank in sorted({1, min(10, settings.rank), settings.rank}):
                values = [_overlaps(single, batches[many], rank, side) for single in singles[one]]
                if values:
                    found[f"{one} sample, {many} batch, {side}, k={rank}"] = {
                        "value": statistics.median(value for value, _ in values),
                        "lowest": min(value for value, _ in values),
                        "highest": max(value for value, _ in values),
                        "chance": statistics.median(chance for _, chance in values),
                        "samples": len(values),
                    }
    return found


def measure_cosines(reader: AnchorReader, subjects: Subjects, settings: GeometrySettings) -> dict[str, Any]:
    """Cosines of safety and task gradients at the start: every safety sample against every task batch."""
    safety = [gradient_of(reader, [row]) for row in subjects.refuse[: settings.samples]]
    tasks = [
        gradient_of(reader, subjects.task[start : start + settings.batch])
        for start in range(0, min(len(subjects.task), 4 * settings.batch), settings.batch)
    ]
    values = [cosine(one, other) for one in safety for other in tasks]
    names = matrix_blocks(safety[0])
    depths = sorted({place_of(name).depth for name in names})
    by_depth = {
        str(depth): statistics.median(
            cosine(one, tasks[0], [name for name in names if place_of(name).depth == depth]) for one in safety[:4]
        )
        for depth in depths
    }
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "negative": sum(value < 0 for value in values) / len(values),
        "pairs": len(values),
        "by_depth": by_depth,
    }


def trace(reader: AnchorReader, subjects: Subjects, settings: GeometrySettings) -> list[dict[str, float]]:
    """Train on the task rows and look at the angle to the safety gradient, the drift and its bound at each step.

    The parameters are changed. Safety is the mean loss of the refusals ``subjects.refuse[:samples]``; the projection of
    ``rule="spf"`` uses that same gradient, so the bound is asked of the loss that the projection protects.
    """
    model = reader.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters.values(), lr=settings.lr)
        if settings.optimizer == "sgd"
        else torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=0.0)
    )
    held = subjects.refuse[: settings.samples]
    draw = random.Random(settings.seed)
    rows: list[dict[str, float]] = []
    safety = gradient_of(reader, held)
    for index in range(settings.steps):
        chosen = draw.sample(subjects.task, min(settings.batch, len(subjects.task)))
        with quiet(model):
            loss = reader.losses(chosen).mean()
            loss.backward()
        row = _one_step(optimizer, parameters, safety, settings)
        after = gradient_of(reader, held)
        row |= {"step": index, "task_loss": float(loss.detach()), "anchor_loss": safety.loss}
        row["drift"] = after.loss - safety.loss
        row["published_loss"] = float(reader.measure(subjects.published).mean()) if subjects.published else float("nan")
        rows.append(row)
        safety = after
    return rows


def _one_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    safety: SafetyGradient,
    settings: GeometrySettings,
) -> dict[str, float]:
    """Project where asked, evaluate the bound, step, and read off the first-order change by the real displacement."""
    task = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    found = spf_algorithm1(task, safety, settings.rank)
    if settings.rule == "spf":
        for name, gradient in found.gradients.items():
            task[name].copy_(gradient)
    limits = bound(task, safety, settings.rank, settings.lr)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    optimizer.zero_grad()
    moved = {name: p.detach() - before[name] for name, p in parameters.items()}
    real = sum(float(value) for name, move in moved.items() if (value := safety.inner(name, move)) is not None)
    return {
        "cosine": found.cosine,
        "conflict": found.conflict,
        "removed": found.removed,
        "first_order": limits.first_order,
        "bound_by_block": limits.by_block,
        "bound_overall": limits.overall,
        "cer": limits.cer,
        "first_order_real": real,
        "moved_squared": sum(float(move.double().square().sum()) for move in moved.values()),
    }


def _spectrum_of(gradient: SafetyGradient, rows: Sequence[TokenisedAnchor]) -> dict[str, Any]:
    values = spectra(gradient)
    curves = {name: energy_curve(singular, list(RANKS)) for name, singular in values.items()}
    by_place: dict[str, dict[str, float]] = defaultdict(dict)
    for name, curve in curves.items():
        place = place_of(name)
        by_place[place.kind][str(place.depth)] = curve[RANKS.index(10)]
    return {
        "rows": len(rows),
        "tokens": sum(len(row.prompt) + len(row.reply) - 1 for row in rows),
        "supervised_tokens": sum(len(row.reply) for row in rows),
        "loss": gradient.loss,
        "blocks": len(curves),
        "ranks": list(RANKS),
        "cer_median": [statistics.median(curve[i] for curve in curves.values()) for i in range(len(RANKS))],
        "cer_lowest": [min(curve[i] for curve in curves.values()) for i in range(len(RANKS))],
        "cer_highest": [max(curve[i] for curve in curves.values()) for i in range(len(RANKS))],
        "effective_rank_median": statistics.median(effective_rank(singular) for singular in values.values()),
        "cer10_by_place": dict(by_place),
    }


def _bases(reader: AnchorReader, rows: Sequence[TokenisedAnchor], rank: int) -> dict[tuple[str, Side], Tensor]:
    """Top singular vectors of every block on both sides (n x rank); fewer directions are their first columns."""
    gradient = gradient_of(reader, rows)
    return {
        (name, side): block_basis(gradient, name, rank, side).U for name in matrix_blocks(gradient) for side in SIDES
    }


def _overlaps(
    one: dict[tuple[str, Side], Tensor], many: dict[tuple[str, Side], Tensor], rank: int, side: Side
) -> tuple[float, float]:
    shared = [key for key in one if key in many and key[1] == side]
    found = [subspace_overlap(one[key][:, :rank], many[key][:, :rank]) for key in shared]
    return statistics.median(o.value for o in found), statistics.median(o.chance for o in found)
