"""The one exception root. Every message says what failed, the value seen, and what to do next."""

from __future__ import annotations


class TrimtabError(Exception):
    """Anything that trimtab refuses or fails to do.

    Args:
        what: what failed, as a short clause.
        seen: the value that caused it, echoed back so that the user need not guess.
        fix: what to do next, in the imperative; a command where there is one.
    """

    exit_code = 2

    def __init__(self, what: str, *, seen: object = None, fix: str = "") -> None:
        self.what, self.seen, self.fix = what, seen, fix
        parts = [what]
        if seen is not None:
            parts.append(f"  seen: {seen}")
        if fix:
            parts.append(f"  fix:  {fix}")
        super().__init__("\n".join(parts))


class UsageError(TrimtabError):
    """The command or the configuration is wrong; nothing was started."""

    exit_code = 1


class DataError(TrimtabError):
    """A file that the user named is missing, malformed or empty."""


class ModelError(TrimtabError):
    """A model, adapter, tokenizer or chat template cannot be used as asked."""


class GuardError(TrimtabError):
    """The guard could not act, or would have acted on nothing."""


class ApproximationError(TrimtabError):
    """An approximation left the range in which it is one, or does not fit the model."""
