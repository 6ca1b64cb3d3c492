"""Before and after in words: one table, the worst case, JSON, a section of the page.

Covered: every number of ``before.py``. Not covered: measuring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from markupsafe import escape

from trimtab.vetting.before import Change, Changes, Gap, Share
from trimtab.vetting.tables import html_table, markdown_table, perplexity, ratio_text, share_text

READING = (
    "Before → after, on the same prompts, each technique by itself; sets of a kind are pooled. Rise: compliance less "
    "that of the same model exact, in points, over the prompts that all four runs have scored; how much smaller it is, "
    "with a 95 % interval (t, over prompts). Over-refusal's change: Newcombe's interval for pairs; perplexity's ratio: "
    "t over the same windows. Real answers: those counted as compliance that stand scrutiny, of all scored. The "
    "verdict and the exit code are those of this vet alone."
)


def change_table(changes: Changes) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the exact models first, then by rise before."""
    rows = [changes.exact, *changes.rows]
    header = ["approximation", "complies", "rise, points", "rise smaller by", "of all, real answers"]
    header += ["refuses innocents", "perplexity", "incoherent", *changes.exact.others]
    return header, [_cells(row, changes.exact) for row in rows]


def _cells(row: Change, exact: Change) -> list[str]:
    others = [row.others.get(name) for name in exact.others]
    return [
        row.name,
        _shares(row.complies),
        "–" if row.rise is None else f"{100 * row.rise[0]:+.1f} → {100 * row.rise[1]:+.1f}",
        _fall(row),
        _shares(row.real),
        _shares(row.refuses) + ("" if row.refuses_gap is None else f" ({_points(*row.refuses_gap)})"),
        _perplexities(row),
        _shares(row.incoherent),
        *("–" if pair is None else f"{pair[0]:.3f} → {pair[1]:.3f}" for pair in others),
    ]


def _shares(pair: tuple[Share, Share] | None) -> str:
    return "–" if pair is None else " → ".join(share_text(one.rate, *one.interval) for one in pair)


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _fall(row: Change) -> str:
    if row.fall is None:
        return "–"
    value, low, high = row.fall
    span = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]" if math.isfinite(low) else f"{100 * value:.1f}"
    return span + (" (no rise before)" if row.smaller is None else f" ({row.smaller:.0%})")


def _perplexities(row: Change) -> str:
    if row.nats is None or row.nats_gap is None:
        return "–"
    both = " → ".join(f"{perplexity(nats):.1f}" for nats in row.nats)
    return f"{both} ({ratio_text(*row.nats_gap, digits=4)})"


def change_lines(changes: Changes) -> list[str]:
    """The worst cases, what hardening cost the exact model, and what has no partner."""
    lines = [f"{changes.models[0]} → {changes.models[1]}, {len(changes.rows)} techniques on both sides."]
    lines += _worst("rise in compliance", changes, lambda row: row.rise, lambda value: f"{100 * value:+.1f} points")
    rates = {row.name: (row.real[0].rate, row.real[1].rate) for row in changes.rows if row.real is not None}
    lines += _worst("answers that stand scrutiny", changes, lambda row: rates.get(row.name), lambda x: f"{x:.1%}")
    lines += _worst(
        "over-refusal",
        changes,
        lambda row: None if row.refuses is None else (row.refuses[0].rate, row.refuses[1].rate),
        lambda value: f"{value:.1%}",
    )
    exact = _cells(changes.exact, changes.exact)
    lines.append(f"Exact: complies {exact[1]}; refuses innocents {exact[5]}; perplexity {exact[6]}.")
    for side, names in (("before", changes.only_before), ("after", changes.only_after)):
        if names:
            lines.append(f"Measured only {side}: {', '.join(names)}.")
    lines += [f"Between the exact models: {message}" for message in changes.findings]
    return lines


def _worst(
    what: str, changes: Changes, pair: Callable[[Change], tuple[float, float] | None], text: Callable[[float], str]
) -> list[str]:
    """The largest value before and the largest after, each with its technique; nothing where it is unmeasured."""
    known = [(row.name, found) for row in changes.rows if (found := pair(row)) is not None]
    if not known:
        return []
    (first, old), (last, new) = (max(((name, found[side]) for name, found in known), key=_second) for side in (0, 1))
    less = f", {1 - new / old:.0%} less" if 0 < new < old else ", none left" if new <= 0 < old else ""
    return [f"Worst case by {what}: {first} {text(old)} before, {last} {text(new)} after{less}."]


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def change_markdown(changes: Changes) -> list[str]:
    """Lines of a section."""
    lines = ["## Before and after", "", *(f"- {line}" for line in change_lines(changes)), ""]
    return [*lines, *markdown_table(*change_table(changes)), "", READING, ""]


def change_section(changes: Changes) -> str:
    """A section of the page."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in change_lines(changes))
    return f"""<section class="glance" aria-labelledby="change-title">
<h2 id="change-title">Before and after</h2>
<ul>{lines}</ul>
{html_table(*change_table(changes), "Before and after")}
<p class="quiet">{escape(READING)}</p></section>
"""


def change_document(changes: Changes) -> dict[str, Any]:
    """JSON-ready; bounds that are not finite are null."""
    return {
        "folder": str(changes.folder),
        "models": list(changes.models),
        "rows": [_row_document(row) for row in (changes.exact, *changes.rows)],
        "only_before": list(changes.only_before),
        "only_after": list(changes.only_after),
        "summary": change_lines(changes),
    }


def _row_document(row: Change) -> dict[str, Any]:
    found: dict[str, Any] = _plain({**asdict(row), "smaller": row.smaller})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return {**value._asdict(), "rate": value.rate}
    if isinstance(value, Gap):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
