"""What a vet measures when little is said, and a flat YAML file instead of flags.

Covered: the default axes and their text, axes that the length of answers does not fit, reading the file with clear
errors. Not covered: measuring.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.flat_yaml import read_flat

KEYS = (
    *("model", "approx", "axis", "perplexity", "accuracy", "out", "limit", "max_new_tokens", "batch_size"),
    *("policy", "title", "redact", "search", "search_prompts", "seeds", "workers", "before"),
)
BUNDLED_TEXT = "bundled-text"  # the data set's name, and the file's in --out
NUMBER_TOKENS = 64  # an answer of `trimtab eval` unless told; a number behind its derivation needs as many at least


def axes_for(
    axes: Sequence[str], out: Path, *, perplexity: str | None = None, accuracy: str | None = None
) -> tuple[AxisSpec, ...]:
    """The axes named, or compliance, over-refusal and perplexity; perplexity of a bundled text where no file is given.

    Raises:
        UsageError: an unknown axis.
    """
    specs = [AxisSpec.parse(text) for text in axes] or [AxisSpec("compliance"), AxisSpec("over_refusal")]
    if accuracy:
        specs.append(AxisSpec("accuracy", dataset=Path(accuracy).stem, path=accuracy))
    if perplexity:
        specs.append(AxisSpec("perplexity", dataset=Path(perplexity).stem, path=perplexity))
    elif not axes:
        specs.append(AxisSpec("perplexity", dataset=BUNDLED_TEXT, path=str(bundled_text(out)), window_chars=1000))
    return tuple(specs)


def cut_off(axes: Sequence[AxisSpec], max_new_tokens: int) -> list[str]:
    """Axes of accuracy whose right answer ends in a number that so short an answer does not reach."""
    return [
        f"{spec.kind}={spec.path or spec.dataset}?match={spec.match}"
        for spec in axes
        if spec.match in ("number", "gsm8k") and max_new_tokens < NUMBER_TOKENS
    ]


def bundled_text(out: Path) -> Path:
    """Ordinary English of this project as one file: held-out instructions and support messages."""
    from trimtab import data

    path = out / f"{BUNDLED_TEXT}.txt"
    lines = [*data.instructions("eval"), *(ticket.text for ticket in data.tickets("eval"))]
    text = "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Flat ``key: value`` lines; the keys are the flags with underscores.

    Raises:
        DataError: missing or not YAML (with the line). UsageError: not flat, an unknown key (the nearest is named), a
            key that is there twice.
    """
    found = read_flat(path, "the configuration", "model: demo")
    for key in found:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            fix = (f"did you mean {near[0]}? " if near else "") + f"Keys: {', '.join(KEYS)}"
            raise UsageError("unknown key in the configuration", seen=f"{path}: {key!r}", fix=fix)
    for key in ("approx", "axis"):
        if isinstance(found.get(key), str):
            found[key] = [found[key]]
        if key in found and not (isinstance(found[key], list) and all(isinstance(item, str) for item in found[key])):
            raise UsageError(
                f"{key} is a name or a list of names", seen=repr(found[key]), fix=f"write, say, {key}: [a8]"
            )
    return found
