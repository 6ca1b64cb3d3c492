"""Lanes of real processes: order, logs, failures, what is skipped, and who gets the cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab import lanes
from trimtab.errors import TrimtabError
from trimtab.lanes import Stage, run_lanes


@pytest.fixture(autouse=True)
def scripts_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's command is a Python script here: still a process with the environment that a command would get."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", command[-1]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(lanes, "cores", lambda: 4)


def script(folder: Path, name: str, wait_for: str | None = None) -> Stage:
    waiting = f"\nwhile not pathlib.Path({str(folder / wait_for)!r}).exists(): time.sleep(0.02)" if wait_for else ""
    writing = f"pathlib.Path({str(folder / name)!r}).write_text(os.environ['OMP_NUM_THREADS'])"
    return Stage(name, [f"import os, pathlib, time{waiting}\n{writing}"], folder / name, None)


def test_a_lane_left_alone_gets_every_core(tmp_path: Path) -> None:
    short, first, last = (
        script(tmp_path, "short"),
        script(tmp_path, "first", wait_for="short"),
        script(tmp_path, "last"),
    )
    gate = script(tmp_path, "gate", wait_for="first")
    run_lanes([[short], [first, gate, last]], tmp_path / "logs")
    threads = {name: (tmp_path / name).read_text() for name in ("short", "first", "last")}
    assert threads == {"short": "2", "first": "2", "last": "4"}


def test_what_is_done_is_skipped_and_counts_as_no_work(tmp_path: Path) -> None:
    done, other = script(tmp_path, "done"), script(tmp_path, "other")
    done.done.write_text("from before")
    run_lanes([[done], [other]], tmp_path / "logs")
    assert done.done.read_text() == "from before"
    assert other.done.read_text() in {"2", "4"}  # it may start before the other lane was looked at


def test_a_failure_shows_its_log_and_stops_the_other_lane(tmp_path: Path) -> None:
    broken = Stage("broken", ["raise SystemExit('no room left')"], tmp_path / "never", None)
    endless = script(tmp_path, "endless", wait_for="never")
    with pytest.raises(TrimtabError, match="no room left"):
        run_lanes([[endless], [broken]], tmp_path / "logs")
    assert not endless.done.exists()
