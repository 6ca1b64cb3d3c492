"""Make text from models, data sets and judges safe to look at.

Covered: characters that a reader cannot see or that reorder what is read, clipping, short model names, times, Markdown.
Not covered: HTML, which the template engine escapes.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

# Controls except tab and line feed; bidirectional and zero-width controls; tag characters, which hide whole texts;
# lone surrogates, which cannot be written as UTF-8. Joiners stay: emoji and several scripts need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
# Inline syntax anywhere, list and heading marks at the start, and the colon of a bare link.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&]|^[-+=]|(?<=^\d)[.)]|:(?=//))")


def visible(text: str) -> str:
    """Replace each unseen or reordering character by its code point, such as ``⟨U+202E⟩``."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))


def clip(text: str, limit: int) -> str:
    """At most ``limit`` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def short_name(model: str, limit: int = 24) -> str:
    """A name for chart and column: the last part of a path or hub id, on one line, clipped."""
    line = " ".join(visible(model).split())
    tail = line.rstrip("/").rsplit("/", 1)[-1] or line
    return clip(tail, limit) or "(no name)"


def moment(iso: str) -> str:
    """An ISO 8601 time as "24 November 2026, 20:31 UTC"; what is no such time stays as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    when = when.astimezone(UTC) if when.tzinfo else when
    return f"{when.day} {when:%B %Y, %H:%M}" + (" UTC" if when.tzinfo else "")


def markdown_text(text: str, limit: int = 200) -> str:
    """One line of Markdown that shows the text and does nothing else."""
    return _MARKDOWN.sub(r"\\\1", clip(" ".join(visible(text).split()), limit))
