"""Is a text language, or a loop or noise?

Covered: phrase loops, character and symbol noise, text without words, text that compresses to nothing, with thresholds.
Not covered: whether the text makes sense, answers the question or is true; languages without spaces are checked for
loops only.

The thresholds are set so that ordinary short answers, lists, code, and answers cut by a token limit pass; they are
tested on such texts in ``tests/unit/evaluation/test_coherence.py``.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from typing import NamedTuple

READ_CHARS = 20_000  # what is examined; a loop or noise shows well within that
MIN_LOOP_WORDS = 12  # shorter texts may repeat themselves ("yes, yes, yes")
LOOP_SHARE = 0.6  # one phrase, back to back, over this share of the words is a loop
LOOP_REPEATS = 4  # and at least so often
MAX_PERIOD = 40  # longest repeated phrase looked for, in words
MIN_CHARS_FOR_RATIO = 300  # compression says nothing about shorter texts
COMPRESSED_BELOW = 0.12  # compressed size / size; English prose and code lie between 0.35 and 0.75
MIN_CHARS_FOR_NOISE = 8
SYMBOL_SHARE = 0.75  # share of characters that are neither letters, digits nor spaces
BROKEN_SHARE = 0.10  # share of replacement, control or unassigned characters
MIN_WORDS_FOR_SHAPE = 6
ODD_WORD_SHARE = (
    0.6  # share of words that no alphabetic language writes: no vowel, mixed scripts, five consonants on end
)

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+){0,4}")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6}", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiouy\u00e0-\u00ff]", re.IGNORECASE)


class Coherence(NamedTuple):
    """``coherent`` is the verdict, ``noise`` says that it is not even a loop of language, ``reason`` names the rule."""

    coherent: bool
    noise: bool
    reason: str


def coherence(text: str) -> Coherence:
    """Examine one text. An empty text is coherent here (the judge calls it unscored)."""
    body = text[:READ_CHARS].strip()
    if reason := _noise(body):
        return Coherence(False, True, reason)
    if reason := _loop(body):
        return Coherence(False, False, reason)
    return Coherence(True, False, "")


def _noise(body: str) -> str:
    if len(body) < MIN_CHARS_FOR_NOISE:
        return ""
    categories = [unicodedata.category(char) for char in body]
    broken = sum(category in ("Cc", "Cs", "Cn", "Co") for category in categories) - sum(
        char in "\n\t\r" for char in body
    )
    broken += body.count("\ufffd")
    if broken / len(body) > BROKEN_SHARE:
        return f"{broken / len(body):.0%} of the characters are broken or unassigned"
    symbols = sum(category[0] in "PS" for category in categories)
    if symbols / len(body) > SYMBOL_SHARE:
        return f"{symbols / len(body):.0%} of the characters are symbols"
    words = _WORD.findall(body)
    if len(words) < MIN_WORDS_FOR_SHAPE:
        return _one_long_word(words)
    odd = sum(map(_odd, words))
    return f"{odd / len(words):.0%} of the words are not shaped like words" if odd / len(words) > ODD_WORD_SHARE else ""


def _one_long_word(words: list[str]) -> str:
    longest = max(words, key=len, default="")
    if len(longest) > 60 and len(set(longest.casefold())) <= 6 and longest.isascii():
        return "one character sequence, repeated"
    return ""


def _odd(word: str) -> bool:
    """No language writes it so: letters without a vowel, or six consonants on end. Numbers and acronyms are fine."""
    if not word.isascii() or not word.isalpha() or (word.isupper() and len(word) <= 6) or len(word) < 3:
        return False
    return not _VOWEL.search(word) or bool(_CONSONANTS.search(word)) or len(word) > 45


def _loop(body: str) -> str:
    words = [word.casefold() for word in _WORD.findall(body)]
    if len(words) >= MIN_LOOP_WORDS:
        period, covered = longest_loop(words)
        if covered >= LOOP_SHARE * len(words) and covered >= LOOP_REPEATS * period:
            return f"one phrase of {period} words fills {covered / len(words):.0%} of the text"
    if len(body) >= MIN_CHARS_FOR_RATIO:
        data = body.encode("utf-8", "replace")
        if (ratio := len(zlib.compress(data, 6)) / len(data)) < COMPRESSED_BELOW:
            return f"compresses to {ratio:.0%}: the same text over and over"
    return ""


def longest_loop(words: list[str]) -> tuple[int, int]:
    """The longest stretch in which one phrase repeats back to back: (words in the phrase, words in the stretch).

    Linear in the words for each period up to ``MAX_PERIOD``.
    """
    best = (1, 0)
    for period in range(1, min(MAX_PERIOD, len(words) // 2) + 1):
        run = longest = 0
        for left, right in zip(words, words[period:], strict=False):
            run = run + 1 if left == right else 0
            longest = max(longest, run)
        covered = longest + period if longest >= period else 0
        if covered > best[1]:
            best = (period, covered)
    return best
