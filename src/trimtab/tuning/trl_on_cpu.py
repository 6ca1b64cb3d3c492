"""Make TRL's supervised loss as cheap on a CPU as it is on a GPU.

TRL scores only the supervised positions where Triton is present; on a CPU it scores every position of every prompt and
then masks them out. With short answers and a vocabulary of 49,152 that is half of a training step. The switch is one
name inside TRL's module; the values are the same (``tests/unit/tuning/test_trl_on_cpu.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def supervised_positions_only() -> Iterator[bool]:
    """Inside, TRL on a CPU projects only positions that have a label; yields whether this TRL has the switch."""
    import torch
    from trl.trainer import utils

    original = getattr(utils, "_use_triton", None)
    if original is None:
        yield False
        return

    def chosen(device: torch.device) -> bool:
        return device.type == "cpu" or bool(original(device))

    utils._use_triton = chosen
    try:
        yield True
    finally:
        utils._use_triton = original
