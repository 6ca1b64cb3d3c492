"""The geometry as Markdown: one table a question."""

from __future__ import annotations

from typing import Any


def to_markdown(document: dict[str, Any]) -> str:
    """Tables of spectra, overlaps, angles and drift."""
    parts = [
        f"# Gradient geometry of {document['model']}",
        f"Task: {document['data']}. Safety: {document['anchors']}. Weights {document['weights']}.",
        "## Energy of the leading directions",
        _spectra(document["spectra"]),
        "## Overlap of one sample's subspace with a batch's",
        _overlaps(document["overlaps"]),
        "## Angle between safety and task gradients at the start",
        _cosines(document["cosines"]),
    ]
    if document["trace"]:
        parts += ["## Along training", _trace(document["trace"], document["settings"])]
    return "\n\n".join(parts) + "\n"


def summary_lines(document: dict[str, Any]) -> list[str]:
    """What a person wants first."""
    spectra, cosines = document["spectra"], document["cosines"]
    ten = spectra["safety sample"]["ranks"].index(10)
    lines = [
        "CER(10), median over blocks   "
        + "   ".join(f"{name}: {one['cer_median'][ten]:.2f}" for name, one in spectra.items()),
        f"cosine(safety, task)          median {cosines['median']:+.3f}, negative in {cosines['negative']:.0%} "
        f"of {cosines['pairs']} pairs",
    ]
    rank = document["settings"]["rank"]
    for pair in ("safety sample, safety batch", "task sample, safety batch"):
        one = document["overlaps"].get(f"{pair}, left, k={rank}")
        if one:
            lines.append(f"overlap {pair:<30} {one['value']:.2f} (chance {one['chance']:.2f})")
    if document["trace"]:
        drift = sum(row["drift"] for row in document["trace"])
        against = sum(row["conflict"] < 0 for row in document["trace"])
        lines.append(
            f"over {len(document['trace'])} steps             anchor loss {drift:+.3f} nats, conflict in {against}"
        )
    return lines


def _spectra(spectra: dict[str, Any]) -> str:
    ranks = next(iter(spectra.values()))["ranks"]
    lines = [
        "| gradient | rows | tokens | loss | " + " | ".join(f"CER({k})" for k in ranks) + " | effective rank |",
        "|---|---|---|---|" + "---|" * (len(ranks) + 1),
    ]
    for name, one in spectra.items():
        cells = [
            f"{middle:.2f} ({low:.2f}-{high:.2f})"
            for middle, low, high in zip(one["cer_median"], one["cer_lowest"], one["cer_highest"], strict=True)
        ]
        lines.append(
            f"| {name} | {one['rows']} | {one['tokens']} | {one['loss']:.2f} | {' | '.join(cells)} | "
            f"{one['effective_rank_median']:.1f} |"
        )
    return "\n".join(lines)


def _overlaps(overlaps: dict[str, Any]) -> str:
    lines = ["| pair, side, k | median over blocks | range over samples | chance | samples |", "|---|---|---|---|---|"]
    for name, one in overlaps.items():
        span = f"{one['lowest']:.2f}-{one['highest']:.2f}"
        lines.append(f"| {name} | {one['value']:.2f} | {span} | {one['chance']:.2f} | {one['samples']} |")
    return "\n".join(lines)


def _cosines(cosines: dict[str, Any]) -> str:
    return (
        "| median | range | negative | pairs |\n|---|---|---|---|\n"
        f"| {cosines['median']:+.3f} | {cosines['lowest']:+.3f} to {cosines['highest']:+.3f} | "
        f"{cosines['negative']:.0%} | {cosines['pairs']} |"
    )


def _trace(trace: list[dict[str, float]], settings: dict[str, Any]) -> str:
    lines = [
        f"{settings['optimizer']}, learning rate {settings['lr']}, rule {settings['rule']}, k = {settings['rank']}. "
        "Drift and bounds in nats.",
        "",
        "| step | task loss | anchor loss | cosine | drift | first order (SGD) | first order (real move) | bound by "
        "block | CER(k) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in trace:
        lines.append(
            f"| {int(row['step'])} | {row['task_loss']:.3f} | {row['anchor_loss']:.4f} | {row['cosine']:+.3f} | "
            f"{row['drift']:+.5f} | {row['first_order']:+.5f} | {row['first_order_real']:+.5f} | "
            f"{row['bound_by_block']:.5f} | {row['cer']:.2f} |"
        )
    return "\n".join(lines)
