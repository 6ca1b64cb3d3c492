"""What libraries say that nobody can act on is not heard; what else they say is."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, sys, warnings
from trimtab.cli.quiet import quieten
quieten()
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU")
logging.getLogger("DeepSpeed").warning("the engine is on fire")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "x")
for module in ("transformers.modeling_utils", "torch.distributed", "mine"):
    warnings.warn_explicit(f"old in {module}", FutureWarning, "a.py", 1, module=module)
warnings.warn_explicit("careful", UserWarning, "a.py", 1, module="transformers.generation")
"""


def heard(*options: str) -> str:
    ended = subprocess.run([sys.executable, *options, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


def test_only_what_nobody_can_act_on_is_left_out() -> None:
    said = heard()
    assert "the engine is on fire" in said and "old in mine" in said and "careful" in said
    for left_out in ("Setting accelerator", "gemm_4bit", "old in transformers", "old in torch"):
        assert left_out not in said


def test_warnings_come_back_when_asked_for() -> None:
    assert "old in transformers" in heard("-W", "default")
