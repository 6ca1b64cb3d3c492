"""`trimtab demo --quick`, whole, as a user runs it; then again, to see that finished stages are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.demo_model import find_gguf
from trimtab.errors import ModelError

pytestmark = pytest.mark.integration


def _demo(out: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "trimtab", "demo", "--quick", "--out", str(out), "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.mark.timeout(1000)
def test_quick_demo_from_data_to_report_and_again(tmp_path: Path) -> None:
    try:
        find_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    out = tmp_path / "demo"
    done = _demo(out)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["runs"]) == {"aligned", "plain", "guarded"}
    for run in found["runs"].values():
        assert {"compliance", "over_refusal", "accuracy", "incoherence"} <= set(run["axes"])
    assert (out / "report.html").stat().st_size > 20_000 and (out / "report.md").is_file()
    assert len((out / "guarded" / "guard.jsonl").read_text().splitlines()) > found["settings"]["steps"]
    started = time.monotonic()
    assert _demo(out).returncode == 0
    assert time.monotonic() - started < 60
