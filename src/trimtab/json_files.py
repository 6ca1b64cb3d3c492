"""A JSON file that must be readable, with an error that names it instead of the parser's traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, TrimtabError


def read_json(path: Path, what: str, fix: str, error: type[TrimtabError] = DataError) -> Any:
    """The document in ``path``.

    Args:
        what, fix: of the error.
        error: its class.

    Raises:
        TrimtabError: of that class, for a file that is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:  # ValueError: bad JSON and bad UTF-8 alike
        raise error(what, seen=f"{path}: {reason}", fix=fix) from reason


def read_object(path: Path, what: str, fix: str, error: type[TrimtabError] = DataError) -> dict[str, Any]:
    """Like ``read_json``, for a file that must hold one JSON object."""
    found = read_json(path, what, fix, error)
    if not isinstance(found, dict):
        raise error(what, seen=f"{path}: {type(found).__name__} where an object was expected", fix=fix)
    return found
