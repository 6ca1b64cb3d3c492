"""A model's name, the same in every verb: ``location?key=value&...`` (see ``models.py``).

Covered: taking it apart. Not covered: whether there is such a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import unquote

from trimtab.errors import UsageError

DEMO_NAMES = ("demo", "demo-unaligned")
_QUERY_KEYS = ("revision", "adapter", "dtype", "device", "chat_template", "approx")


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model name. ``location`` is everything before the ``?``."""

    location: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None
    chat_template: str | None = None
    approx: str | None = None

    @classmethod
    def parse(cls, name: str, **overrides: str | None) -> ModelSpec:
        """Split ``location?key=value&...``; keyword overrides that are not None win.

        Raises:
            UsageError: for an unknown key.
        """
        location, _, query = name.partition("?")
        parts = [part.partition("=") for part in query.split("&")] if query else []
        options = {key: unquote(value) for key, _, value in parts}
        for key in options:
            if key not in _QUERY_KEYS:
                raise UsageError(
                    f"unknown key in the model name {name!r}", seen=key, fix=f"use one of: {', '.join(_QUERY_KEYS)}"
                )
            if not options[key]:
                raise UsageError(
                    f"a key without a value in the model name {name!r}", seen=key, fix=f"write {key}=VALUE"
                )
        given = {key: value for key, value in overrides.items() if value is not None}
        return replace(cls(location=location), **{**options, **given})
