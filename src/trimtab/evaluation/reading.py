"""Untrusted text, made plain enough for rules: one shape of quotes, no markdown, nothing invisible, bounded length.

Covered: normalisation of the head of an answer, its sentences, its list items, neutralising chat-template tokens before
another model reads the text. Not covered: what the words mean (``refusal_rules.py``).

Every step is linear in a bounded prefix, so no answer, however long or hostile, makes a judge slow.
"""

from __future__ import annotations

import re
import unicodedata

HEAD_CHARS = 2400  # what the rules read; a refusal that starts later comes after real content and is not one
RAW_CHARS = 12_000  # what is normalised to get that head
MAX_SENTENCES = 12

_STRAIGHT = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201b\u2032\u02bc\uff07`\u00b4", "'")
    | dict.fromkeys("\u201c\u201d\u201e", '"')
    | dict.fromkeys("\u2013\u2014\u2010\u2011", "-")
)
_MARKDOWN = re.compile(r"[*_#>~|]{1,64}")
_SPACES = re.compile(r"[^\S\n]+")
_LIST_ITEM = re.compile(
    r"^[ \t]{0,8}(?:\d{1,2}[.):]|[-*+\u2022]|step \d{1,2}\b|```)[ \t]{0,8}\S?", re.IGNORECASE | re.MULTILINE
)
_SENTENCE_END = re.compile(r"[.!?]['\")\]]{0,3}(?=\s)|\n")
_CONTROL_TOKEN = re.compile(
    r"<\|[^<>|\n]{1,64}\|>|<\uff5c[^<>\n]{1,64}\uff5c>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|<</?SYS>>|\[/?INST\]"
)


def normalise(text: str) -> str:
    """The head of an answer in one shape: straight quotes, no markdown marks, no invisible characters, lower case."""
    head = unicodedata.normalize("NFKC", text[:RAW_CHARS].lstrip())[:RAW_CHARS]
    visible = "".join(char if char in "\n\t" else _visible(char) for char in head)
    plain = _MARKDOWN.sub(" ", visible.translate(_STRAIGHT)).casefold()
    return _SPACES.sub(" ", plain).strip()[:HEAD_CHARS]


def sentences(text: str, limit: int = MAX_SENTENCES) -> list[str]:
    """The first sentences (or lines) of a normalised text, without empty ones."""
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if piece := text[start : match.end()].strip():
            found.append(piece)
        start = match.end()
        if len(found) == limit:
            return found
    if tail := text[start:].strip():
        found.append(tail)
    return found


def list_items(text: str) -> int:
    """How many list items, numbered steps or code fences a normalised text has."""
    return sum(1 for _ in _LIST_ITEM.finditer(text))


def neutralise(text: str) -> str:
    """Text that can stand in another model's prompt: chat-template tokens lose their meaning but stay visible.

    A zero-width space after the first character keeps a tokenizer from taking ``<|im_start|>`` for its control token.
    Lone surrogates and NULs are replaced, because tokenizers refuse them.
    """
    broken = _CONTROL_TOKEN.sub(lambda found: found.group(0)[0] + "\u200b" + found.group(0)[1:], text)
    return broken.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def _visible(char: str) -> str:
    """Drop format characters (zero width, bidi), surrogates and private use; controls become spaces."""
    category = unicodedata.category(char)
    if category in ("Cf", "Cs", "Co"):
        return ""
    return " " if category in ("Cc", "Zl", "Zp", "Zs") else char
