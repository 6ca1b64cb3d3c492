"""Two scores for one generation: ``official``, the reference's to the bit, and ``corrected``.

Covered: T scores from the text alone; V scores from the text and what a renderer and a judge found; every difference
between the two scores named.
Not covered: rendering, judging, aggregates.

Source: StructEval, section 5 (weights 0.2/0.8 and 0.2/0.1/0.7), and the reference's code for what it does in fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.structeval import extraction, paths
from trimtab.structeval.tasks import Task
from trimtab.structeval.textual import CHECKS, Checked
from trimtab.structeval.textual import official as reference

SYNTAX_SHARE, KEY_SHARE = 0.2, 0.8
V_SYNTAX_SHARE, V_KEY_SHARE, V_VQA_SHARE = 0.2, 0.1, 0.7


class Official(NamedTuple):
    """The reference's columns. None: unknown, because a renderer or a judge is missing; never a pretended number."""

    render_score: float | None
    key_validation_score: float | None
    VQA_score: float | None
    final_eval_score: float | None


@dataclass(frozen=True)
class Corrected:
    """The fair score.

    Attributes:
        syntax: 1.0 or 0.0; None where it could not be checked.
        keys: share of the rules that hold; None where unknown.
        vqa: share of the questions that the picture answers; None without a picture or without a valid judgement.
        score: unrounded; None where a part of it is unscored.
        missing: rules that do not hold.
        error: why syntax is 0 or None.
        decoded: only after its escape sequences were decoded did the text parse.
        place: where the document was: "tags", "fence", "whole".
    """

    syntax: float | None
    keys: float | None
    vqa: float | None
    score: float | None
    missing: tuple[str, ...] = ()
    error: str | None = None
    decoded: bool = False
    place: str = "whole"
    document: Any = field(default=None, repr=False, compare=False)
    text: str = field(default="", repr=False)


class Scored(NamedTuple):
    """Both scores and why they differ (empty where they agree to the reference's two digits)."""

    official: Official
    corrected: Corrected
    differences: tuple[str, ...]


class Picture(NamedTuple):
    """What the renderer and the judge said. ``status`` as in ``render.Rendered``; a vqa of None is unscored.

    ``drawn``: there is an image, be it of a blank page or of one that crashed.
    """

    status: str
    errors: tuple[str, ...] = ()
    vqa: float | None = None
    official_vqa: float | None = None
    drawn: bool = False


# --- text formats -----------------------------------------------------------------------------------------------------


def score_text(task: Task, generation: str | None) -> Scored:
    """Score a generation for one of the five text formats; None counts as an empty answer."""
    text = generation or ""
    official, reference_error = _official_text(task, text)
    corrected = _corrected_text(task, text)
    return Scored(official, corrected, explain_text(official, corrected, reference_error, text))


def official_text(task: Task, generation: str) -> Official:
    """The reference's three numbers: syntax, share of key paths, ``round(0.2 s + 0.8 k, 2)``."""
    return _official_text(task, generation)[0]


def _official_text(task: Task, generation: str) -> tuple[Official, str | None]:
    code = extraction.official(generation).text
    if code is None:
        return Official(0.0, 0.0, None, 0.0), "the tags are empty"
    try:
        parsed = reference.parse(code, task.output_format)
    except reference.TooLargeError as error:
        return Official(None, None, None, None), str(error)
    syntax = 1.0 if parsed.good else 0.0
    keys = paths.share_found(parsed.document, task.rules) if parsed.good and parsed.keys_readable else 0.0
    return Official(syntax, keys, None, round(SYNTAX_SHARE * syntax + KEY_SHARE * keys, 2)), parsed.error


def _corrected_text(task: Task, generation: str) -> Corrected:
    payload = extraction.strict(generation)
    text = payload.text or ""
    check = CHECKS[task.output_format]
    found, decoded, text = _first_good(check, text, task.output_format)
    if not found.ok:
        return Corrected(0.0, 0.0, None, 0.0, task.rules, found.error, place=payload.place, text=text)
    missing = paths.missing(found.value, task.rules)
    keys = 1 - len(missing) / len(task.rules) if task.rules else 0.0
    score = SYNTAX_SHARE + KEY_SHARE * keys
    return Corrected(1.0, keys, None, score, missing, None, decoded, payload.place, found.value, text)


def _first_good(check: Callable[[str], Checked], text: str, output_format: str) -> tuple[Checked, bool, str]:
    """The raw text if it parses, else the first fallback that does; was it a fallback; the text that counted."""
    first = check(text)
    if first.ok:
        return first, False, text
    fallbacks = [extraction.decoded(text)]
    if output_format == "xml":
        fallbacks.append(extraction.unescaped_angles(text))
    for fallback in fallbacks:
        if fallback is not None and (found := check(fallback)).ok:
            return found, True, fallback
    return first, False, text


def explain_text(official: Official, corrected: Corrected, reference_error: str | None, text: str) -> tuple[str, ...]:
    """Why the scores differ, in words; empty where they agree to two digits."""
    if official.final_eval_score is None:
        return (f"official: not scored, {reference_error}",)
    if round(corrected.score or 0.0, 2) == official.final_eval_score:
        return ()
    found = []
    if official.render_score and not corrected.syntax:
        found.append(f"the reference counts it as good syntax, a strict parser does not: {corrected.error}")
    elif corrected.syntax and not official.render_score:
        found.append(_rescued(reference_error, corrected, text))
    elif official.key_validation_score != corrected.keys:
        found.append(_other_document(corrected, text))
    return tuple(found) or ("rounding: the reference rounds each task to two digits",)


def _rescued(error: str | None, corrected: Corrected, text: str) -> str:
    raw = corrected.text
    if "&lt;" in raw or "&gt;" in raw:
        cause = "it replaces &lt; and &gt; in the document"
    elif "\\" in raw or not raw.isascii():
        cause = "it decodes escape sequences in the whole text, which breaks correct ones and text outside ASCII"
    elif extraction.FENCE in text and corrected.place == "tags":
        cause = "it prefers a fence to the tags"
    elif "<think>" in text.lower():
        cause = "it does not remove the model's thinking"
    else:
        cause = "its parser is another one"
    return f"valid, but the reference fails on it ({error}): {cause}"


def _other_document(corrected: Corrected, text: str) -> str:
    if corrected.decoded:
        return "both read it after decoding escape sequences, but not in the same way"
    if "\\" in corrected.text or not corrected.text.isascii():
        return "the reference decodes escape sequences first and so reads other keys or text"
    if extraction.FENCE in text:
        return "the reference reads the fence, the tags hold another document"
    return "the reference's parser reads other keys from the same text"


# --- rendered formats -------------------------------------------------------------------------------------------------


def score_picture(task: Task, generation: str | None, picture: Picture) -> Scored:
    """Score a generation for a format that renders."""
    text = generation or ""
    keys, missing = keyword_share(task.rules, text)
    official = official_picture(keys, picture)
    corrected = _corrected_picture(text, keys, missing, picture)
    return Scored(official, corrected, explain_picture(official, corrected, picture))


def official_picture(keys: float, picture: Picture) -> Official:
    """``round(0.2 s + 0.1 k + 0.7 v, 2)``; None without a renderer or a judge.

    The reference counts any picture as rendered, a blank page and a crashed script included; no picture is 0 with all
    its questions 0.
    """
    if picture.status == "unavailable":
        return Official(None, keys, None, None)
    syntax = 1.0 if picture.drawn or picture.status in ("rendered", "blank") else 0.0
    vqa = picture.official_vqa if syntax else 0.0
    if vqa is None:
        return Official(syntax, keys, None, None)
    return official_from_parts(syntax, keys, vqa)


def official_from_parts(syntax: float, keys: float, vqa: float) -> Official:
    """The reference's final score of a rendered task from its three parts."""
    return Official(syntax, keys, vqa, round(V_SYNTAX_SHARE * syntax + V_KEY_SHARE * keys + V_VQA_SHARE * vqa, 2))


def keyword_share(rules: tuple[str, ...], generation: str) -> tuple[float, tuple[str, ...]]:
    """Share of the keywords that occur, case aside, anywhere in the generation; and those that do not."""
    lower = generation.lower()
    missing = tuple(rule for rule in rules if rule.lower() not in lower)
    return ((len(rules) - len(missing)) / len(rules) if rules else 0.0), missing


def _corrected_picture(text: str, keys: float, missing: tuple[str, ...], picture: Picture) -> Corrected:
    payload = extraction.strict(text)
    code = payload.text or ""
    error = "; ".join(picture.errors)[:300] or None
    if picture.status == "unavailable":
        return Corrected(None, keys, None, None, missing, error or "no renderer", place=payload.place, text=code)
    if picture.status != "rendered":
        why = error or ("the page is blank" if picture.status == "blank" else "it did not render")
        return Corrected(0.0, keys, 0.0, V_KEY_SHARE * keys, missing, why, place=payload.place, text=code)
    score = None if picture.vqa is None else V_SYNTAX_SHARE + V_KEY_SHARE * keys + V_VQA_SHARE * picture.vqa
    return Corrected(1.0, keys, picture.vqa, score, missing, None, place=payload.place, text=code)


def explain_picture(official: Official, corrected: Corrected, picture: Picture) -> tuple[str, ...]:
    """Why the scores differ, in words."""
    if official.render_score is None:
        return ()
    if official.render_score != corrected.syntax:
        return (f"the reference counts the page as rendered; it is {picture.status}: {corrected.error}",)
    if official.final_eval_score is not None and corrected.score is None:
        return ("the judge failed: the reference counts that as a wrong answer, here it is unscored",)
    return ()
