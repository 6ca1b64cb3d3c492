"""`trimtab harden` on the real small model through the real CLI: an adapter within its bound, then measured."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from trimtab import data

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2000)]

LONGEST = 900  # seconds of one command; other processes may have the cores


class Ended(NamedTuple):
    """A command that came to its end, or was ended: ``code`` is then that of ``timeout``."""

    code: int
    printed: str
    errors: str
    story: str


def run(words: str) -> Ended:
    """Run a command; ``story`` is all that is known of it, for a failing assertion to tell."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", *words.split()], capture_output=True, text=True, timeout=LONGEST
        )
        code, printed, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        parts = (part or b"" for part in (stopped.stdout, stopped.stderr))
        code, (printed, errors) = 124, (part if isinstance(part, str) else part.decode() for part in parts)
    how = f"signal {signal.Signals(-code).name}, out of memory?" if code < 0 else f"exit code {code}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    free = psutil.virtual_memory().available / 1e9
    story = "\n".join([
        f"trimtab {words}",
        f"{how} after {time.monotonic() - started:.0f} s (at most {LONGEST}); load {load} on {os.cpu_count()} cores, "
        f"{free:.1f} GB free",
        f"standard output: {printed[-4000:] or 'nothing'}",
        f"standard error: {errors[-8000:] or 'nothing'}",
    ])  # fmt: skip
    print(story)  # pytest shows it where this or a later assertion fails
    return Ended(code, printed, errors, story)


def test_a_short_hardening_ends_within_its_bound_and_can_be_measured(tmp_path: Path) -> None:
    out = tmp_path / "hardened"
    small = "--pairs 12 --texts 12 --steps 2 --batch-size 2 --innocent-rows 2"
    words = f"harden demo --noise teal:0.5 --noise a6 {small} --out {out} --json"
    hardened = run(words)
    assert hardened.code == 0, hardened.story
    found = json.loads(hardened.printed)
    assert found["steps"] == 2 and math.isfinite(found["loss"]), found
    assert 0 < found["size"]["scale"] <= 1, found
    assert 0 < found["size"]["drift"] <= found["settings"]["drift_bound"], found
    record = json.loads((out / "trimtab.json").read_text())["harden"]
    assert record["scale"] == found["size"]["scale"], record
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert not (out / "progress").exists(), left

    again = run(words)
    assert again.code == 1 and "finished adapter" in again.errors, again.story

    measured = tmp_path / "measured"
    vetted = run(f"eval demo?adapter={out}&approx=a6 --axis compliance?limit=2 --max-new-tokens 4 --out {measured}")
    assert vetted.code == 0, vetted.story
    assert json.loads((measured / "results.json").read_text())["results"], vetted.story


def perplexity(name: str, folder: Path) -> float:
    """Of a page of bundled English."""
    text = folder.with_suffix(".txt")
    text.write_text("\n\n".join(one.text for one in data.tickets("train"))[:6000])
    ended = run(f"eval {name} --axis perplexity={text} --out {folder}")
    assert ended.code == 0, ended.story
    (found,) = json.loads((folder / "results.json").read_text())["results"].values()
    return math.exp(found["nats_per_token,none"])


def test_a_rotated_model_is_the_same_until_it_is_rounded(tmp_path: Path) -> None:
    out = tmp_path / "rotated"
    rotated = run(f"harden demo --method rotate --out {out} --json")
    assert rotated.code == 0, rotated.story
    assert json.loads(rotated.printed)["gap"] < 1e-4, rotated.story
    models = {"given": "demo", "rotated": str(out)}
    exact = {which: perplexity(name, tmp_path / f"{which}-exact") for which, name in models.items()}
    a5 = {which: perplexity(f"{name}?approx=a5", tmp_path / f"{which}-a5") for which, name in models.items()}
    assert exact["rotated"] == pytest.approx(exact["given"], rel=1e-3)
    assert a5["rotated"] < 0.5 * a5["given"]
    trained = run(
        f"harden {out} --noise a5 --pairs 12 --texts 12 --steps 1 --batch-size 2 --out {tmp_path / 'adapter'}"
    )
    assert trained.code == 0, trained.story
