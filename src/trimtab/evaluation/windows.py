"""A text cut into windows whose likelihood is measured.

Covered: non-overlapping windows of whole lines, with stable ids, the same for every model, so that two models are
paired on them whatever their tokenizers. Not covered: sliding windows with overlap (lower loss, many times the cost).
"""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import DataError, UsageError
from trimtab.evaluation.datasets import Prompt, PromptSet
from trimtab.evaluation.files import read_text

MIN_WINDOW_CHARS = 20


def text_windows(path: str | Path, *, window_chars: int = 2000) -> PromptSet:
    """Windows of at most ``window_chars`` characters, cut at line ends where lines are shorter than a window.

    Raises:
        DataError: missing or empty file.
        UsageError: a window too small to mean anything.
    """
    if window_chars < MIN_WINDOW_CHARS:
        raise UsageError("a window is too small", seen=window_chars, fix=f"use at least {MIN_WINDOW_CHARS} characters")
    pieces = cut(read_text(Path(path)), window_chars)
    if not pieces:
        raise DataError(
            "that text is empty: nothing would be measured", seen=path, fix="name a text file that holds text"
        )
    prompts = tuple(Prompt(f"window-{number:05d}", "", piece) for number, piece in enumerate(pieces))
    return PromptSet(f"{Path(path).name}/{window_chars}", prompts)


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most ``size`` characters; joined they give the text, but for pieces that are blank."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if len(current) + len(part) > size:
                pieces.append(current)
                current = ""
            current += part
    return [piece for piece in [*pieces, current] if piece.strip()]
