"""What may follow an axis behind a question mark: ``accuracy=test.jsonl?match=gsm8k&limit=100``.

Covered: splitting, types, which setting belongs to which kind of axis. Not covered: what the settings do
(``runner.py`` and the tasks).
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from trimtab.errors import UsageError

MATCHES = ("choice", "exact", "number", "gsm8k")
ROUGES = ("rouge1", "rouge2", "rougeL")
_ANY = "any kind"
#: Setting -> (kinds of axis that have it, allowed words; None for a number, "" for any text).
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | str | None]] = {
    "match": (("accuracy",), MATCHES),
    "which": (("rouge",), ROUGES),
    "window_chars": (("perplexity",), None),
    "revision": (("compliance", "over_refusal"), ""),
    "split": (("compliance", "over_refusal", "jailbreak", "accuracy"), ("train", "eval")),
    "limit": ((_ANY,), None),
}


def settings_in(text: str) -> tuple[str, dict[str, str | int]]:
    """The axis without its settings, and the settings.

    A question mark is only read as such where ``key=value`` follows, so a file's name may hold one.

    Raises:
        UsageError: an unknown key, a word that a setting does not know, a number that is none.
    """
    body, mark, query = text.rpartition("?")
    whole = text.partition("=")[2]
    if not mark or "=" not in query or (whole and Path(whole).exists()):
        return text, {}
    pairs = [part.partition("=") for part in query.split("&")]
    return body, {key: _value(key, unquote(value), text) for key, _, value in pairs}


def check_settings(kind: str, settings: dict[str, str | int], text: str) -> None:
    """Raise for a setting that this kind of axis does not have: it would be ignored."""
    for key in settings:
        kinds, _ = SETTINGS[key]
        if kinds != (_ANY,) and kind not in kinds:
            fix = f"{key} is a setting of {' and '.join(kinds)}; leave it out here"
            raise UsageError(f"an axis of kind {kind} has no setting {key!r}", seen=text, fix=fix)


def _value(key: str, value: str, text: str) -> str | int:
    if key not in SETTINGS:
        raise UsageError("unknown setting of an axis", seen=f"{key!r} in {text}", fix=f"use: {', '.join(SETTINGS)}")
    _, words = SETTINGS[key]
    if words is None:
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"{key} must be a whole number above 0", seen=text, fix=f"write ?{key}=100")
        return int(value)
    if not value or (words and value not in words):
        fix = f"use one of: {', '.join(words)}" if words else f"write ?{key}=VALUE"
        raise UsageError(f"{key} does not know that value", seen=f"{value!r} in {text}", fix=fix)
    return value
