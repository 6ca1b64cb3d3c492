"""Flat YAML files, as a person writes them: ``key: value`` lines, each key once.

Covered: reading, and what is wrong with the file, in words. Not covered: which keys and values are known (the caller).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import DataError, UsageError


def read_flat(path: Path, what: str, example: str) -> dict[Any, Any]:
    """The keys and values of a file; of an empty one, none.

    Args:
        what: the file in messages, such as "the policy". example: a line that it may hold.

    Raises:
        DataError: missing, not text, or not YAML (with the line). UsageError: not flat, a key that is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {what}", seen=f"{path}: {error}", fix="check the path") from error
    except yaml.YAMLError as error:
        seen = f"{path}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"{what} is not YAML", seen=seen, fix="mend that line") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        seen = f"{path}: {type(found).__name__}"
        raise UsageError(f"{what} must be flat `key: value` lines", seen=seen, fix=f"write, say, {example}")
    _check_once(text, path, what)
    return found


def _check_once(text: str, path: Path, what: str) -> None:
    """YAML's reader takes the last of two equal keys and says nothing.

    Raises:
        UsageError: a key of the outermost mapping that is there twice, with both lines.
    """
    lines: dict[str, int] = {}
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.value in lines:
            seen = f"{path}, lines {lines[key.value]} and {line}: {key.value}"
            raise UsageError(f"a key is in {what} twice", seen=seen, fix="leave one of them")
        lines[key.value] = line
