"""Whose numbers a folder holds: settings and model of what is in it, compared before anything is added.

Covered: settings by value; a model by the hashes of its fingerprint, and by how its files look from outside, so that a
finished vet need not load it. Not covered: a model on the hub, or the base of a local adapter, that changes after
everything was measured: no file of it is looked at until something is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.evaluation.logs import SUMMARY
from trimtab.model_names import ModelSpec

PRINTS = ("weights", "tokenizer", "chat_template", "generation")  # of a fingerprint: what makes another model of it
MODEL, FILES = "fingerprint", "files"
CONTENT = "sha256:"  # before the hash of what a file holds


def read_settings(path: Path) -> dict[str, Any]:
    """What was written there; empty where there is no such file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise DataError("the settings of that folder cannot be read", seen=path, fix="name another --out") from error


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any], word: str = "asked for") -> str:
    """What differs, with both values; empty where nothing does."""
    names = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    return ", ".join(f"{name}: {held.get(name)} there, {wanted.get(name)} {word}" for name in names)


def other_model(held: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How two fingerprints tell two models apart; empty where they do not. What one of them lacks says nothing."""
    both = [name for name in PRINTS if name in held and name in now]
    return differences({name: held[name] for name in both}, {name: now[name] for name in both}, "now")


def recorded(folder: Path) -> dict[str, str]:
    """The fingerprint of what was measured into that folder to the end; empty where nothing says."""
    try:
        return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["trimtab"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def files_of(model: str) -> str:
    """Names, sizes and times of a local model's files as a hash; empty for one that is no path, or is gone."""
    spec = ModelSpec.parse(model)
    places = [Path(text) for text in (spec.location, spec.adapter, spec.chat_template) if text]
    files = [path for place in places for path in ([place] if place.is_file() else place.glob("*")) if path.is_file()]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16] if facts else ""


def content_of(path: Path) -> str:
    """What a file, or every file of a folder, holds as a hash, wherever it lies; empty where nothing is."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    if not files:
        return ""
    found = hashlib.sha256()
    for one in files:
        found.update(json.dumps([str(one.relative_to(path)), one.stat().st_size]).encode())
        found.update(one.read_bytes())
    return CONTENT + found.hexdigest()[:16]
