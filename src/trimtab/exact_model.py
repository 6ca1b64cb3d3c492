"""Work that changes or explains weights takes the exact model: an approximation on top would be learnt from or lost."""

from __future__ import annotations

from trimtab.errors import UsageError
from trimtab.model_names import ModelSpec


def require_exact(name: str, verb: str, instead: str = "") -> None:
    """Refuse a name with an approximation.

    Args:
        name: a model name as the user wrote it.
        verb: the command, for the message. instead: what to write there, if anything.

    Raises:
        UsageError: where it carries ``?approx=``.
    """
    if ModelSpec.parse(name).approx:
        raise UsageError(f"{verb} takes the exact model", seen=name, fix=f"leave approx= out of the name{instead}")
