"""Run trimtab commands as processes, several lanes side by side, with one status line.

Covered: the cores shared out among the lanes that still have work, logs, progress read from the children's own bars,
skipping what is done, stopping everything when one stage fails. Not covered: what the commands are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import TrimtabError

_PERCENT = re.compile(rb"(\d{1,3})%\|")
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Stage:
    """One command. ``done``: the file that proves it finished; ``clean``: what to remove before it starts anew."""

    name: str
    command: list[str]
    done: Path
    clean: Path | None


@dataclass
class _Lane:
    stages: list[Stage]
    index: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def stage(self) -> Stage | None:
        return self.stages[self.index] if self.index < len(self.stages) else None


def run_lanes(lanes: Sequence[Sequence[Stage]], logs: Path) -> None:
    """Run every lane's stages in order, the lanes side by side.

    Raises:
        TrimtabError: when a stage fails; the message carries the end of its log, and the other lanes are stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running = [_Lane(list(stages)) for stages in lanes]
    shown = ""
    try:
        while any(lane.stage for lane in running):
            for lane in running:
                busy = sum(other.stage is not None for other in running)
                _advance(lane, logs, max(1, cores() // max(1, busy)))
            shown = _show(running, logs, shown)
            time.sleep(_POLL_SECONDS)
    finally:
        for lane in running:
            if lane.process is not None and lane.process.poll() is None:
                lane.process.terminate()
                lane.process.wait(timeout=20)
        if sys.stderr.isatty() and shown:
            print(file=sys.stderr)


def cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or under ``taskset``."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _advance(lane: _Lane, logs: Path, threads: int) -> None:
    stage = lane.stage
    if stage is None:
        return
    if lane.process is None:
        if stage.done.is_file():
            lane.index += 1
            return
        if stage.clean is not None:
            shutil.rmtree(stage.clean, ignore_errors=True)
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with _log(logs, stage).open("wb") as stream:
            lane.process = subprocess.Popen(
                [sys.executable, "-m", "trimtab", *stage.command],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **limits},
            )  # fmt: skip
        return
    code = lane.process.poll()
    if code is None:
        return
    lane.process = None
    if code != 0 or not stage.done.is_file():
        tail = _log(logs, stage).read_bytes().decode(errors="replace").replace("\r", "\n").strip().splitlines()[-12:]
        raise TrimtabError(
            f"{stage.name} failed (exit code {code})",
            seen="\n        ".join(tail),
            fix=f"read {_log(logs, stage)}; the same command goes on where it stopped",
        )
    lane.index += 1


def _show(running: list[_Lane], logs: Path, before: str) -> str:
    """One line, rewritten in a terminal; elsewhere a new line only when a stage begins or ends."""
    stages = [lane.stage for lane in running if lane.stage is not None]
    names = " | ".join(stage.name for stage in stages)
    if not sys.stderr.isatty():
        if names != before and names:
            print(f"  {names}", file=sys.stderr, flush=True)
        return names
    text = " | ".join(f"{stage.name} {_percent(_log(logs, stage))}" for stage in stages)
    print(f"\r\033[K  {text}", end="", file=sys.stderr, flush=True)
    return text


def _percent(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        found = _PERCENT.findall(stream.read())
    return f"{int(found[-1])} %" if found else ""


def _log(logs: Path, stage: Stage) -> Path:
    return logs / (re.sub(r"[^a-z0-9]+", "-", stage.name.lower()) + ".log")
