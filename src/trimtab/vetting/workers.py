"""Several approximations at once, each in a process of its own with its own copy of the model.

On a CPU two processes of one thread answer more prompts than one of two threads: the steps between the products of
matrices, and everything that is not a product, use one core only (docs/results/approximations.md, time).

Covered: sharing names out, errors of a process, how many processes fit. Not covered: measuring (``sweep.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.models import LoadedModel

if TYPE_CHECKING:
    from trimtab.vetting.sweep import VetSettings, Vetted

MOST = 4  # by default: every process reads all weights, and memory has only so much bandwidth
HELD: dict[str, Any] = {}  # of a worker: its bench, made with its first technique


def fitting(loaded: LoadedModel, names: int, most: int = MOST) -> int:
    """How many processes to use by default: one a core, at most ``most``; one on an accelerator.

    A process holds the weights twice (packed for the processor while it answers) and its activations, so three times
    the weights have to fit into half of the free memory.
    """
    import psutil

    if loaded.device.type != "cpu":
        return 1
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    free = int(psutil.virtual_memory().available)
    return max(1, min(names, cores(), most, free // (2 * 3 * weights)))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_all(
    settings: VetSettings, names: Sequence[str], out: Path, workers: int, done: Callable[[str, Vetted, float], Any]
) -> None:
    """Measure every name into ``out``; ``done`` is called here with name, result and seconds as they come.

    Raises:
        TrimtabError: as ``sweep``; what is finished stays. A process that the system ended is named as such.
    """
    threads = max(1, cores() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,)) as pool:
        waiting = {pool.submit(_measure, settings, name, out): name for name in names}
        try:
            for future in as_completed(waiting):
                done(waiting[future], *future.result())
        except BrokenProcessPool as error:
            fix = "run the same command again with --workers 1: what is finished is kept"
            raise TrimtabError("a process of the sweep ended early", seen="out of memory?", fix=fix) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _measure(settings: VetSettings, name: str, out: Path) -> tuple[Vetted, float]:
    """In a worker. The model is loaded here, not at the start, so that its errors are told as they are."""
    from trimtab.models import load
    from trimtab.vetting import sweep
    from trimtab.vetting.bench import Bench

    if "bench" not in HELD:
        HELD["bench"] = Bench(load(settings.model))
    return sweep.vet_one(HELD["bench"], settings, name, out, progress=False)
