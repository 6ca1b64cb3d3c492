"""Is an answer the right one?

Covered: classification (the answer begins with the label), exact match after normalisation, the last number.
Not covered: free text that only a reader can grade.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Match = Literal["choice", "exact", "number", "gsm8k"]

_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_LEAD_IN = re.compile(r"^(?:the )?(?:answer|label|category|class)(?: is|:)?[\W_]{1,8}")
_NUMBER = re.compile(r"-?\d[\d,]{0,30}(?:\.\d{1,30})?")
MAX_CHARS = 20_000


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no punctuation at the edges, no markdown."""
    plain = unicodedata.normalize("NFKC", text[:MAX_CHARS]).replace("*", "").replace("`", "").casefold()
    return _EDGES.sub("", " ".join(plain.split()))


def is_correct(answer: str, target: str, choices: Sequence[str] = (), match: Match | None = None) -> bool | None:
    """Whether ``answer`` is right; None where the model said nothing.

    Args:
        answer: what the model wrote.
        target: the right answer.
        choices: allowed labels; where given, the answer counts for the longest label that it begins with
            ("Billing." and "The label is billing" count for "billing", "billings" does not).
        match: "choice", "exact", "number" (the last number of each, thousands separators removed), or "gsm8k" (the
            number behind "####", and nothing else counts: the strict rule of the set's authors);
            default: choice where there are choices, else exact.
    """
    said = normalise_answer(answer)
    if not said:
        return None
    rule = match or ("choice" if choices else "exact")
    if rule == "choice":
        return chosen(said, choices or (target,)) == normalise_answer(target)
    if rule == "gsm8k":
        return gsm8k_answer(answer) is not None and gsm8k_answer(answer) == gsm8k_answer(target)
    if rule == "number":
        return last_number(answer) is not None and last_number(answer) == last_number(target)
    return said == normalise_answer(target)


def chosen(said: str, choices: Sequence[str]) -> str | None:
    """Which label a normalised answer begins with (the longest that fits), normalised; None where none fits."""
    body = _LEAD_IN.sub("", said)
    for label in sorted(map(normalise_answer, choices), key=len, reverse=True):
        for text in (said, body):
            if text.startswith(label) and not text[len(label) : len(label) + 1].isalnum():
                return label
    return None


_HASHES = re.compile(r"####\s*\$?(-?\d[\d,]{0,30}(?:\.\d{1,30})?)")


def gsm8k_answer(text: str) -> float | None:
    """The number behind the first "####"; None without one. Source: Cobbe et al. 2021, arXiv 2110.14168, its code."""
    found = _HASHES.search(text[:MAX_CHARS])
    return float(found.group(1).replace(",", "")) if found else None


def last_number(text: str) -> float | None:
    """The last number in a text (after "####" where there is one), commas removed."""
    tail = text[-MAX_CHARS:].rpartition("####")[2]
    found = _NUMBER.findall(tail)
    return float(found[-1].replace(",", "")) if found else None
