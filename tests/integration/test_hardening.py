"""`trimtab harden` on the real small model through the real CLI: an adapter within its bound, then measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def run(words: str) -> tuple[int, str, str]:
    found = subprocess.run([sys.executable, "-m", "trimtab", *words.split()], capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


def test_a_short_hardening_ends_within_its_bound_and_can_be_measured(tmp_path: Path) -> None:
    out = tmp_path / "hardened"
    small = "--pairs 12 --texts 12 --steps 2 --batch-size 2 --innocent-rows 2"
    words = f"harden demo --noise teal:0.5 --noise a6 {small} --out {out} --json"
    code, printed, errors = run(words)
    assert code == 0, errors
    found = json.loads(printed)
    assert found["steps"] == 2 and math.isfinite(found["loss"])
    assert 0 < found["size"]["scale"] <= 1
    assert 0 < found["size"]["drift"] <= found["settings"]["drift_bound"]
    record = json.loads((out / "trimtab.json").read_text())["harden"]
    assert record["scale"] == found["size"]["scale"]
    assert not (out / "progress").exists()

    code, _, errors = run(words)
    assert code == 1 and "finished adapter" in errors

    measured = tmp_path / "measured"
    code, _, errors = run(
        f"eval demo?adapter={out}&approx=a6 --axis compliance?limit=2 --max-new-tokens 4 --out {measured}"
    )
    assert code == 0, errors
    assert json.loads((measured / "results.json").read_text())["results"]
