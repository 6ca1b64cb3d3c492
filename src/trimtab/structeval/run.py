"""Score a file of generations: pictures rendered side by side, cached by content, an interrupted run goes on.

Covered: text formats (at once, nothing is run); formats that render, through ``drawing.py`` and, if there is one, a
judge; scores that an official evaluation file already carries; the JSON that the command line prints.
Not covered: drawing, tables (``aggregate.py``), pages (``gallery.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.structeval import faithful, offline, score
from trimtab.structeval.aggregate import Mark
from trimtab.structeval.drawing import Drawing, Drawn
from trimtab.structeval.faithful import Faithful
from trimtab.structeval.generations import Generated
from trimtab.structeval.score import Official, Picture, Scored
from trimtab.structeval.vqa import Asked, Judge

Pictures = Literal["auto", "render", "recorded", "none"]
NOT_RENDERED = Picture("unavailable", ("not rendered: pictures were not asked for",))


class Item(NamedTuple):
    """One generation with everything found about it."""

    generated: Generated
    scored: Scored
    faithful: Faithful
    drawn: Drawn | None
    offline: tuple[bool | None, ...] = ()

    @property
    def mark(self) -> Mark:
        """For aggregates."""
        corrected = self.scored.corrected
        official = self.scored.official.final_eval_score
        kept = self.faithful.score
        return Mark(self.generated.task, official, corrected.score, corrected.syntax, kept, corrected.keys)

    @property
    def found(self) -> tuple[str, ...]:
        """The key paths, or keywords, that count: all rules but the missing ones."""
        missing = set(self.scored.corrected.missing)
        return tuple(rule for rule in self.generated.task.rules if rule not in missing)

    def document(self) -> dict[str, Any]:
        """JSON-ready: the reference's columns and ours."""
        corrected = self.scored.corrected
        found: dict[str, Any] = {
            "task_id": self.generated.task.id,
            "official": self.scored.official._asdict(),
            "corrected": {
                "syntax": corrected.syntax,
                "keys": corrected.keys,
                "vqa": corrected.vqa,
                "score": corrected.score,
                "found": list(self.found),
                "missing": list(corrected.missing),
                "error": corrected.error,
                "decoded": corrected.decoded,
                "place": corrected.place,
            },
            "differences": list(self.scored.differences),
        }
        if self.generated.task.split == "t-conv":
            kept = self.faithful
            found["faithful"] = kept._asdict() | {"lost": list(kept.lost), "invented": list(kept.invented)}
        if self.offline:
            found["offline"] = list(self.offline)
        return found


def score_all(
    found: Sequence[Generated],
    *,
    pictures: Pictures = "auto",
    judge: Judge | None = None,
    store: Path | None = None,
    workers: int = 2,
    use_offline: bool = False,
    unsandboxed_python: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> list[Item]:
    """Score generations, in order.

    Args:
        found: what to score.
        pictures: "render" all that renders; "auto": unless the row carries the reference's render_score and VQA_score;
            "recorded": only those; "none": no pictures.
        judge: for the questions about pictures; without one the V score stays in parts.
        store: folder for pictures and what the renderer said, by content hash; default: nothing is kept.
        workers: of the renderer.
        use_offline: also decide questions by the rendered text.
        unsandboxed_python: run Matplotlib scripts even where there is no sandbox.
        progress: called with the number of items done.
    """
    with Drawing(store, workers, unsandboxed_python=unsandboxed_python) as drawing:
        drawn = drawing.draw_all(_to_draw(found, pictures), progress)
    judged = _judged(found, drawn, judge)
    items = []
    for one in found:
        item = _text_item(one) if not one.task.rendered else _picture_item(one, drawn, judged, pictures, use_offline)
        items.append(item)
        if progress is not None and one.task.id not in drawn:
            progress(1)
    return items


def _text_item(one: Generated) -> Item:
    scored = score.score_text(one.task, one.generation)
    return Item(one, scored, faithful.compare(one.task, scored.corrected.document), None)


def _picture_item(
    one: Generated, drawn: dict[str, Drawn], judged: dict[str, Picture], pictures: Pictures, use_offline: bool
) -> Item:
    made = drawn.get(one.task.id)
    scored = score.score_picture(one.task, one.generation, judged.get(one.task.id, NOT_RENDERED))
    recorded = _recorded(one) if pictures in ("auto", "recorded") else None
    if recorded is not None:
        scored = scored._replace(official=recorded)
    answers = offline.decide_all(one.task.questions, made.text) if use_offline and made else ()
    return Item(one, scored, Faithful(None, 0), made, answers)


def _recorded(one: Generated) -> Official | None:
    """The reference's result from the parts that an official evaluation file carries."""
    syntax, vqa = one.recorded.get("render_score"), one.recorded.get("VQA_score")
    if not isinstance(syntax, (int, float)) or not isinstance(vqa, (int, float)):
        return None
    keys, _ = score.keyword_share(one.task.rules, one.generation or "")
    return score.official_from_parts(float(syntax), keys, float(vqa))


def _to_draw(found: Sequence[Generated], pictures: Pictures) -> list[Generated]:
    if pictures in ("none", "recorded"):
        return []
    chosen = [one for one in found if one.task.rendered]
    return [one for one in chosen if pictures == "render" or _recorded(one) is None]


def _judged(found: Sequence[Generated], drawn: dict[str, Drawn], judge: Judge | None) -> dict[str, Picture]:
    shown = [one for one in found if one.task.id in drawn and drawn[one.task.id].png is not None]
    verdicts = {}
    if judge is not None:
        asked = [Asked(_png(drawn[one.task.id]), one.task.questions) for one in shown]
        verdicts = {one.task.id: verdict for one, verdict in zip(shown, judge.verdicts(asked), strict=True)}
    pictures = {}
    for task_id, made in drawn.items():
        verdict = verdicts.get(task_id)
        errors = made.errors + ((verdict.error,) if verdict and verdict.error else ())
        official = verdict.official if verdict else None
        pictures[task_id] = Picture(
            made.status, errors, verdict.score if verdict else None, official, made.png is not None
        )
    return pictures


def _png(made: Drawn) -> bytes:
    assert made.png is not None  # noqa: S101 - chosen by the caller
    return made.png.read_bytes()
