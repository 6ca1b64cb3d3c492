"""Tables and numbers of a vet's report as text: Markdown, HTML, shares, perplexity.

Covered: escaping and layout. Not covered: what is in them (``report.py``, ``before_words.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import escape

Body = Sequence[Sequence[str]]


def markdown_table(header: Sequence[str], body: Body) -> list[str]:
    """Lines of a Markdown table."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, *body)]
    return [rows[0], "|" + "---|" * len(header), *rows[1:]]


def html_table(header: Sequence[str], body: Body, label: str) -> str:
    """A table that scrolls, and is read cell by cell on a narrow screen."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    rows = "".join(_row(header, cells) for cells in body)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f'<table class="overview stack" role="table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(header: Sequence[str], cells: Sequence[str]) -> str:
    first = f'<th scope="row" role="rowheader"><bdi>{escape(cells[0])}</bdi></th>'
    rest = "".join(
        f'<td role="cell" data-label="{escape(name)}">{escape(_unbroken(cell))}</td>'
        for name, cell in zip(header[1:], cells[1:], strict=True)
    )
    return f'<tr role="row">{first}{rest}</tr>'


def _unbroken(cell: str) -> str:
    """Lines may break between numbers, not inside an interval."""
    return cell.replace(" %", "\u00a0%").replace("% [", "%\u00a0[").replace(", ", ",\u00a0")


def share_text(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def ratio_text(nats: float, low: float, high: float, digits: int = 3) -> str:
    """A ratio of perplexities from a difference in nats, with its interval."""
    value, lower, upper = (f"{perplexity(one):.{digits}g}" for one in (nats, low, high))
    return f"×{value} [{lower}, {upper}]"


def perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
