"""Score a file of generations: pictures rendered side by side, cached by content, an interrupted run goes on.

Covered: text formats (at once, nothing is run); formats that render, through ``render`` and, if there is one, a judge;
scores that an official evaluation file already carries; the JSON that the command line prints.
Not covered: drawing (``render``), tables (``aggregate.py``), pages (``gallery.py``).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.structeval import extraction, faithful, generations, offline, score
from trimtab.structeval.aggregate import Mark
from trimtab.structeval.faithful import Faithful
from trimtab.structeval.generations import Generated
from trimtab.structeval.score import Official, Picture, Scored
from trimtab.structeval.vqa import Asked, Judge

Pictures = Literal["auto", "render", "recorded", "none"]
STORE = "pictures.jsonl"
NOT_RENDERED = Picture("unavailable", ("not rendered: pictures were not asked for",))


@dataclass(frozen=True)
class Drawn:
    """What the renderer made of one document. ``png``: file with the picture, or None."""

    status: str
    text: str = ""
    errors: tuple[str, ...] = ()
    png: Path | None = None
    seconds: float = 0.0


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
        return Mark(self.generated.task, official, corrected.score, corrected.syntax, self.faithful.score)

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
        progress: called with the number of items done.
    """
    drawn = draw_all(_to_draw(found, pictures), store=store, workers=workers, progress=progress)
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


# --- drawing, with a store --------------------------------------------------------------------------------------------


def draw_all(
    wanted: Sequence[Generated], *, store: Path | None, workers: int, progress: Callable[[int], Any] | None = None
) -> dict[str, Drawn]:
    """Render each generation's document once; what the store has is not rendered again."""
    if not wanted:
        return {}
    import tempfile

    folder = store or Path(tempfile.mkdtemp(prefix="trimtab-structeval-"))
    folder.mkdir(parents=True, exist_ok=True)
    codes = {one.task.id: extraction.strict(one.generation or "").text or "" for one in wanted}
    keys = {one.task.id: content_key(one.task.output_format, codes[one.task.id]) for one in wanted}
    known = {row["key"]: _drawn_from(row, folder) for row in generations.read_lines(folder / STORE)}
    todo = {keys[one.task.id]: (one.task.output_format, codes[one.task.id]) for one in wanted}
    missing = {key: job for key, job in todo.items() if key not in known}
    if progress is not None:
        progress(sum(keys[one.task.id] in known for one in wanted))
    with generations.append(folder / STORE) as stream:
        for key, row in _render(missing, folder, workers):
            known[key] = _drawn_from(row, folder)
            if row["status"] != "unavailable":  # once the renderer is installed, it is asked again
                generations.write_line(stream, row)
            if progress is not None:
                progress(sum(value == key for value in keys.values()))
    return {task_id: known[key] for task_id, key in keys.items()}


def content_key(output_format: str, code: str) -> str:
    """Hash of what decides a picture: format, document, renderer versions."""
    text = "\0".join((output_format, code, renderer_version()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def renderer_version() -> str:
    """Versions of the renderers, as ``render`` reports them; "none" where it is not installed."""
    try:
        module = importlib.import_module("trimtab.structeval.render")
    except ImportError:
        return "none"
    version = getattr(module, "version", None)
    return str(version()) if callable(version) else "1"


def _render(missing: dict[str, tuple[str, str]], folder: Path, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = {key for key, (_, code) in missing.items() if not code}
    for key in empty:
        yield key, {"key": key, "status": "failed", "errors": ["the answer is empty"], "text": "", "png": None}
    jobs = [(key, job) for key, job in missing.items() if key not in empty]
    if not jobs:
        return
    try:
        render = importlib.import_module("trimtab.structeval.render")
    except ImportError as error:
        for key, _ in jobs:
            yield (
                key,
                {"key": key, "status": "unavailable", "errors": [f"no renderer: {error}"], "text": "", "png": None},
            )
        return
    with render.Renderer(workers=workers) as renderer:
        for (key, _), made in zip(jobs, renderer.render_many([job for _, job in jobs]), strict=True):
            name = f"{key[:32]}.png" if made.png else None
            if made.png and name:
                partial = folder / f"{name}.partial"
                partial.write_bytes(made.png)
                partial.replace(folder / name)
            yield (
                key,
                {
                    "key": key,
                    "format": made.format,
                    "status": made.status,
                    "errors": [str(error)[:500] for error in made.errors[:5]],
                    "text": made.text[:20_000],
                    "png": name,
                    "seconds": made.seconds,
                },
            )


def _drawn_from(row: dict[str, Any], folder: Path) -> Drawn:
    png = folder / Path(str(row["png"])).name if row.get("png") else None
    if png is not None and not png.is_file():
        png = None
    return Drawn(row["status"], row.get("text", ""), tuple(row.get("errors", ())), png, row.get("seconds", 0.0))
