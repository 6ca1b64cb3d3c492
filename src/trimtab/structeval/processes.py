"""What a program that we started has started itself: how much memory all of it holds, and ending all of it.

Reads ``/proc``; where there is none (not Linux), a program counts as one process without memory, and only its process
group is ended. Not covered: processes whose parents are gone; in a namespace of their own they end with it, and at the
weak level of ``sandbox.py`` a worker adopts them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """``resident`` in bytes."""

    resident: int
    processes: int


def descendants(pid: int) -> list[int]:
    """``pid`` and all processes below it, parents first."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, ValueError):  # it ended meanwhile, or there is no /proc
            continue
    return found


def resident_bytes(pid: int) -> int:
    """Memory that one process holds now, in bytes; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def usage(pid: int) -> Usage:
    """Of ``pid`` and all its descendants."""
    pids = descendants(pid)
    return Usage(sum(map(resident_bytes, pids)), len(pids))


def kill_all(pid: int, patience: float = 10.0) -> None:
    """End ``pid`` (the head of a process group), its group and all its descendants, also those in other groups.

    Returns when none of them runs any more, or after ``patience`` seconds: a killed program takes a while to go where
    the processors are busy. ``pid`` itself is left for the caller to wait for.
    """
    rest = descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for one in rest:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)
    end = time.monotonic() + patience
    while _runs(pid, set(rest)) and time.monotonic() < end:
        time.sleep(0.005)


def _runs(group: int, pids: set[int]) -> bool:
    """Whether a process of the group, or one of ``pids``, has not ended; one that only waits to be reaped has."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if state not in "ZX" and (int(its_group) == group or int(folder.name) in pids):
            return True
    return False
