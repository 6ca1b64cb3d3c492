"""One page to look at answers: prompt, answer, picture, scores, missing rules; and the tables.

Covered: one self-contained HTML file, everything escaped, no script, a content security policy that loads nothing.
Not covered: filtering in the page (filter before: ``trimtab structeval report --format vue``).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trimtab.structeval import table
from trimtab.structeval.aggregate import tables
from trimtab.structeval.run import Item

MOST_ITEMS = 300
_MOST_CHARS = 20_000
_MOST_PICTURE_BYTES = 3_000_000


def to_html(items: Sequence[Item], *, title: str = "StructEval: answers", most: int = MOST_ITEMS) -> str:
    """The page; above ``most`` items the worst (by corrected score, then by id) are shown and the page says so."""
    shown = sorted(items, key=_badness)[:most] if len(items) > most else list(items)
    style = resources.files("trimtab.structeval").joinpath("templates/gallery.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("trimtab.structeval", "templates"), autoescape=True, undefined=StrictUndefined
    )
    found = tables([item.mark for item in items])
    return environment.get_template(
        "gallery.html.j2"
    ).render(
        title=" ".join(_visible(title).split()),
        csp=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 - our own file
        items=[_view(item) for item in shown],
        total=len(items),
        note="the worst first" if len(shown) < len(items) else "",
        heads=table.HEADS[1:],
        tables=[(name, [table.cells(line) for line in lines]) for name, lines in found.items()],
    )


def _view(item: Item) -> dict[str, Any]:
    task, corrected = item.generated.task, item.scored.corrected
    return {
        "id": _visible(task.id),
        "name": _visible(task.name),
        "official": table.score_text(item.scored.official.final_eval_score),
        "corrected": table.score_text(corrected.score),
        "faithful": table.score_text(item.faithful.score) if task.split == "t-conv" else "",
        "notes": [_visible(line) for line in _notes(item)],
        "missing": [_visible(rule) for rule in corrected.missing],
        "found": [_visible(rule) for rule in item.found],
        "rule": "keyword" if task.rendered else "key path",
        "rules": len(task.rules),
        "lost": [_visible(line) for line in (*item.faithful.lost, *item.faithful.invented)],
        "picture": _picture(item),
        "prompt": _visible(task.query),
        "answer": _visible(item.generated.generation or ""),
    }


def _notes(item: Item) -> list[str]:
    corrected = item.scored.corrected
    found = [corrected.error] if corrected.error else []
    if corrected.decoded:
        found.append("parsed only after its escape sequences were decoded")
    if item.drawn:
        found.append(f"renderer: {item.drawn.status}")
        found += item.drawn.errors
    if item.faithful.note:
        found.append(item.faithful.note)
    return list(dict.fromkeys([*found, *item.scored.differences]))


def _picture(item: Item) -> str:
    if item.drawn is None or item.drawn.png is None:
        return ""
    data = item.drawn.png.read_bytes()
    if len(data) > _MOST_PICTURE_BYTES or not data.startswith(b"\x89PNG"):
        return ""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _badness(item: Item) -> tuple[float, str]:
    score = item.scored.corrected.score
    return (-1.0 if score is None else score), item.generated.task.id


def _visible(text: str) -> str:
    """Without NULs, lone surrogates and marks that turn the reading direction; bounded in length."""
    clean = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")
    clean = "".join(
        "\ufffd" if char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" else char for char in clean
    )
    return clean if len(clean) <= _MOST_CHARS else f"{clean[:_MOST_CHARS]} [{len(clean) - _MOST_CHARS} more characters]"
