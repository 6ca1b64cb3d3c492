"""Questions about the picture that need no model: those that the rendered text decides.

Covered: what a heading, label, title, button or legend says, which options or names are listed: decided by
the text that the renderer saw; everything else (colours, places, shapes, counts,
placeholders, which are no text of the page) is left undecided.
Not covered: a replacement for a judge. Used only on request, and reported with how many questions it decided.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.structeval.tasks import Question

NAME = "offline-text@1"
_ABOUT_TEXT = re.compile(
    r"\btext\b|\blabel|\btitle|\bheading|\bheader|\bcaption|\blegend|\bname|\bsay|\boption|\bwritten\b|"
    r"\bdisplayed\b|\bwhich (?:items|values|categories|labels|words)\b|\bformula\b",
    re.IGNORECASE,
)
_NOT_TEXT = re.compile(
    r"\bcolou?r|\bfont\b|\bbold\b|\bitalic|\bhow many\b|\bwhere\b|\bposition|\bplaced\b|\blocated\b|\balign|"
    r"\barranged?\b|"
    r"\bshape\b|\bsize\b|\bwidth\b|\bheight\b|\bstyle|\bborder|\bbackground|\blayout\b|\bclass\b|\bclick|"
    r"\bafter\b|\bhover|"
    r"\belement\b|\bcomponent\b|\bmarker|\bplaceholder|\blevel\b|\bformatted\b|\bbesides?\b|\bdescribe",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"“']([^\"”']{1,200})[\"”']")
_WORD = re.compile(r"\w+(?:[.:/-]\w+)*")
_FILLER = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "both",
        "each",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "one",
        "or",
        "that",
        "the",
        "there",
        "this",
        "three",
        "to",
        "two",
        "with",
    ]
)


class Decision(NamedTuple):
    """``answer`` None: the text does not decide the question."""

    answer: bool | None
    why: str


def decide(question: Question, text: str) -> Decision:
    """Does the rendered text show the expected answer?

    True where every word of the answer (or everything that it quotes) is in the text; False where none of it is;
    undecided between, and for questions that are not about text.
    """
    if _NOT_TEXT.search(question.question) or not _ABOUT_TEXT.search(question.question):
        return Decision(None, "not about text")
    seen = f" {' '.join(_words(text))} "
    wanted = [_words(part) for part in _QUOTED.findall(question.answer)] or [_words(question.answer)]
    wanted = [words for words in wanted if words]
    if not wanted or not seen.strip():
        return Decision(None, "no words to look for")
    phrases = [f" {' '.join(words)} " in seen for words in wanted]
    if all(phrases):
        return Decision(True, "the phrase is in the text")
    content = [word for words in wanted for word in words if word not in _FILLER]
    found = [f" {word} " in seen for word in content]
    if content and all(found):
        return Decision(True, "all its words are in the text")
    if content and not any(found):
        return Decision(False, "none of its words is in the text")
    return Decision(None, "some of its words are in the text")


def decide_all(questions: Sequence[Question], text: str) -> tuple[bool | None, ...]:
    """An answer for each question, None where the text does not decide."""
    return tuple(decide(question, text).answer for question in questions)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
