"""One run at a time in a folder.

Covered: a lock that goes with the process, however it ends. Not covered: network file systems without locks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import UsageError

LOCK = ".trimtab.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for one run; the lock goes with the process, however it ends.

    Raises:
        UsageError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait for it, or give this one another --out"
            raise UsageError("another run is writing into that folder", seen=folder, fix=fix) from error
        yield
