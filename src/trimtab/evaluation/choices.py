"""Options of a multiple-choice question, in the layouts that the usual sets come in.

Covered: a list of options with the answer's text, number (from 0) or letter; options under letters (``{"A": ...}``);
``{"text": [...], "label": [...]}`` as ARC has them; columns ``choice0``, ``choice1``, ... or ``A``, ``B``, ... as
MMLU's files have them; ``one | two`` in a table. Not covered: several right answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from trimtab.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Options(NamedTuple):
    """The options, and the answer as one of them (as it was given, where there are none)."""

    choices: tuple[str, ...]
    answer: str


def options(row: Mapping[str, Any], answer: Any, where: str) -> Options:
    """Read options and answer of one row.

    A whole number that stands for no option's text is the option's place, counted from 0; in columns of their own and
    where the answer is a JSON number beside texts it always is, as MMLU means it.

    Raises:
        DataError: the answer is none of the options.
    """
    labels, texts, numbered = _found(row)
    if not texts:
        return Options((), str(answer))
    said = str(answer).strip()
    place = int(said) if said.isdigit() else None
    counted = numbered or (isinstance(answer, int) and not isinstance(answer, bool) and said not in texts)
    if place is not None and place < len(texts) and (counted or said not in (*texts, *labels)):
        return Options(texts, texts[place])
    if said in texts:
        return Options(texts, said)
    if str(answer) in texts:
        return Options(texts, str(answer))
    if said in labels:
        return Options(texts, texts[labels.index(said)])
    raise DataError(
        "the answer is not among the choices",
        seen=f"{where}: {answer!r} not in {list(texts)}",
        fix="name a choice's text or its letter as the answer",
    )


def _found(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Labels, texts, and whether an answer in digits is a place in any case."""
    value = row.get("choices")
    if isinstance(value, Mapping) and isinstance(value.get("text"), (list, tuple)):
        texts = tuple(map(str, value["text"]))
        return tuple(map(str, value.get("label") or LETTERS[: len(texts)])), texts, False
    if isinstance(value, Mapping):
        return tuple(map(str, value)), tuple(map(str, value.values())), False
    if isinstance(value, str):
        value = [part.strip() for part in value.split("|") if part.strip()]
    if value:
        texts = tuple(map(str, value))
        return tuple(LETTERS[: len(texts)]), texts, False
    for names in ([f"choice{place}" for place in range(26)], list(LETTERS)):
        texts = tuple(str(row[name]) for name in takewhile(lambda name: row.get(name) not in (None, ""), names))
        if len(texts) > 1:
            return tuple(LETTERS[: len(texts)]), texts, True
    return (), (), False
