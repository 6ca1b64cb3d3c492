"""The end of a process launched with others: what was asked for at exit happens, and no teardown that may abort."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys
import torch.distributed as distributed
from trimtab import cli

class Torn:
    def __del__(self): print("torn down", flush=True)

kept = Torn()
atexit.register(print, "at exit")
if {grouped}:
    distributed.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
sys.argv = ["trimtab", *{words}]
cli.main()
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["no-such-verb"], 1)])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_launched_process_ends_without_teardown(grouped: bool, words: list[str], code: int, tmp_path: Path) -> None:
    """Threads of a process group that is not freed would want the interpreter while it is taken down: SIGABRT."""
    program = PROGRAM.format(grouped=grouped, store=tmp_path / "store", words=words)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr
    assert "at exit" in ended.stdout
    assert ("torn down" in ended.stdout) is not grouped
