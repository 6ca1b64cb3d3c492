"""From what a model wrote to the document in it: the reference's way (``official``) and a fair one (``strict``).

Covered: the tags ``<|BEGIN_CODE|>`` and ``<|END_CODE|>``, Markdown fences, think blocks, escape sequences.
Not covered: parsing (``textual``), rendering.

The reference uses regular expressions whose time grows with the square of the text on hostile input; the same matches
are found here by linear searches, and a test holds the two together.
"""

from __future__ import annotations

import codecs
import re
import warnings
from typing import NamedTuple

BEGIN = "<|BEGIN_CODE|>"
END = "<|END_CODE|>"
FENCE = "```"
_BEGIN = re.compile(r"<\|BEGIN_CODE\|>[ \t]*\n?", re.IGNORECASE)
_END = re.compile(r"<\|END_CODE\|>", re.IGNORECASE)
_EMPTY_THINK = "<think>\n\n</think>\n\n"
_OPEN_THINK = re.compile(r"<think>", re.IGNORECASE)
_CLOSE_THINK = re.compile(r"</think>", re.IGNORECASE)
_STRAY_BACKSLASH = re.compile(r"\\(?![\\'\"abfnrtv]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})")
_HTML_STARTS = ("<html>", "<div class")


class Payload(NamedTuple):
    """A document found in a generation.

    ``text``: the document; None where the reference would have raised. ``place``: "tags", "fence" or "whole".
    """

    text: str | None
    place: str


class _Fence(NamedTuple):
    start: int
    payload: str


# --- official ---------------------------------------------------------------------------------------------------------


def official(generation: str) -> Payload:
    """The reference's extraction for the five text formats.

    Escape sequences are decoded in the whole text first; then tags or a fence, whichever comes first; then, whatever
    was found, a fence anywhere replaces it. Empty tags make the reference raise: ``text`` is None.
    """
    text = decoded_like_reference(generation, drop_empty_think=True)
    found = _tags_or_fence(text)
    if found.text is None:
        return found
    fence = _first_fence(text)
    return found if fence is None else Payload(fence.payload.strip(), "fence")


def official_renderable(generation: str, output_format: str) -> Payload:
    """The reference's extraction for formats that render: no second look for a fence, and nothing found is an error."""
    if output_format in ("latex", "tikz"):
        text = "".join(char for char in generation if char in "\n\t" or ord(char) >= 32)
    else:
        text = _decoded_or_patched(generation)
    found = _tags_or_fence(text)
    if found.place == "whole" and not text.lstrip().startswith(_HTML_STARTS):
        return Payload(None, "whole")
    return found


def decoded_like_reference(text: str, *, drop_empty_think: bool = False) -> str:
    """``&lt;`` and ``&gt;`` replaced, then Python's ``unicode_escape`` over everything; an error leaves what there is.

    Text outside ASCII becomes noise, and a correct ``\\"`` inside a JSON string becomes a syntax error: that is the
    reference's rule.
    """
    text = text.replace("&lt;", "<").replace("&gt;", ">")
    if drop_empty_think:
        text = text.replace(_EMPTY_THINK, "")
    try:
        return _unicode_escape(text)
    except ValueError:
        return text


def _decoded_or_patched(text: str) -> str:
    text = text.replace("&lt;", "<").replace("&gt;", ">")
    for candidate in (text, _STRAY_BACKSLASH.sub(r"\\\\", text)):
        try:
            return _unicode_escape(candidate)
        except ValueError:
            continue
    return text


def _unicode_escape(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "\d" and its like: kept as they are
        return str(codecs.decode(text, "unicode_escape"))


def _tags_or_fence(text: str) -> Payload:
    tags, fence = _BEGIN.search(text), _first_fence(text)
    if tags and (fence is None or tags.start() < fence.start):
        end = _END.search(text, tags.end())
        inside = text[tags.end() : end.start() if end else len(text)]
        empty = not inside or (end is None and inside == "\n")
        return Payload(None if empty else inside.strip(), "tags")
    return Payload(fence.payload.strip(), "fence") if fence else Payload(text.strip(), "whole")


def _first_fence(text: str) -> _Fence | None:
    """The first three back-ticks with a line end somewhere behind them, up to the next three or the end."""
    start = text.find(FENCE)
    line_end = text.find("\n", start + len(FENCE)) if start >= 0 else -1
    if line_end < 0:
        return None
    end = text.find(FENCE, line_end + 1)
    return _Fence(start, text[line_end + 1 : end if end >= 0 else len(text)])


# --- strict -----------------------------------------------------------------------------------------------------------


def strict(generation: str) -> Payload:
    """The document as the model meant it: thinking removed, tags win over fences, nothing is decoded.

    A fence that wraps everything between the tags is taken off. Unclosed thinking hides all that follows it. ``text``
    is never None; an empty answer is "".
    """
    text = _without_thinking(generation)
    tags = _BEGIN.search(text)
    if tags:
        end = _END.search(text, tags.end())
        inside = text[tags.end() : end.start() if end else len(text)].strip()
        return Payload(_without_fence(inside), "tags")
    fence = _first_fence(text)
    return Payload(fence.payload.strip(), "fence") if fence else Payload(text.strip(), "whole")


def _without_thinking(text: str) -> str:
    kept, position = [], 0
    while opened := _OPEN_THINK.search(text, position):
        kept.append(text[position : opened.start()])
        closed = _CLOSE_THINK.search(text, opened.end())
        if closed is None:
            return "".join(kept)
        position = closed.end()
    return "".join(kept) + text[position:]


def decoded(text: str) -> str | None:
    """Escape sequences decoded without harm to other characters; None where there are none or they are broken.

    The fallback for models that write ``\\n`` for a line end.
    """
    if "\\" not in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
            found.encode("utf-8")
    except ValueError:
        return None
    return found.strip() if found != text else None


def unescaped_angles(text: str) -> str | None:
    """``&lt;`` and ``&gt;`` taken as markup; None where there are none. A fallback for XML alone."""
    found = text.replace("&lt;", "<").replace("&gt;", ">")
    return found if found != text else None


def _without_fence(text: str) -> str:
    if not text.startswith(FENCE):
        return text
    fence = _first_fence(text)
    if fence is None:
        return text
    closed = FENCE + text.partition("\n")[0].removeprefix(FENCE) + "\n" + fence.payload + FENCE
    return fence.payload.strip() if text in (closed, closed.removesuffix(FENCE)) else text
