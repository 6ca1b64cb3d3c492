"""What this machine can run: one line a capability, and what to install where it is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimtab.errors import ModelError

ENGINES = {  # renderers of structured output, by the names that people know
    "browser": "chromium",
    "node": "node",
    "svg": "resvg",
    "tex": "tex",
    "typst": "typst",
    "plot": "matplotlib",
    "vega": "vl-convert",
}


@dataclass(frozen=True)
class Check:
    """``ok`` None: optional and absent."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""

    def line(self) -> str:
        """For a person."""
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{mark} {self.name:<12} {self.found}" + (f"\n{'':18}{self.fix}" if self.fix and not self.ok else "")


def examine() -> list[Check]:
    """Look at everything; imports torch."""
    return [_python(), _torch(), _accelerator(), _memory(), _disk(), _demo(), *_renderers(), *_packages()]


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")


def _torch() -> Check:
    import torch

    from trimtab.precision import cpu_has_bfloat16

    half = "bfloat16 in hardware" if cpu_has_bfloat16() else "no bfloat16 instructions: train in float32 on this CPU"
    return Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads, CPU: {half}")


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.device_count()} x {', '.join(names)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        return Check("gpu", True, found)
    if torch.backends.mps.is_available():
        return Check("gpu", True, "Apple MPS")
    return Check("gpu", None, "none: the demo and models of a few hundred million parameters run on the CPU")


def _memory() -> Check:
    try:
        size, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_AVPHYS_PAGES")
        free = size * pages / 2**30
    except (ValueError, OSError, AttributeError):
        return Check("memory", None, "unknown on this system")
    return Check("memory", free >= 4, f"{free:.1f} GiB free, {os.cpu_count()} cores", "the demo needs about 4 GiB")


def _disk() -> Check:
    from trimtab.demo_model import cache_dir

    folder = next(path for path in (cache_dir(), *cache_dir().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 2**30
    return Check(
        "disk", free >= 2, f"{free:.1f} GiB free for {cache_dir()}", "free 2 GiB, or set TRIMTAB_CACHE elsewhere"
    )


def _demo() -> Check:
    from trimtab.demo_model import INSTALL, find_gguf

    try:
        return Check("demo model", True, Path(find_gguf()).name)
    except ModelError as error:
        return Check("demo model", None, error.what, INSTALL)


def _renderers() -> list[Check]:
    from trimtab.structeval.render.availability import engines, sandbox_state

    isolated, found, fix = sandbox_state()
    checks = [Check("sandbox", True if isolated else None, found, fix)]
    for engine in engines():
        name = ENGINES[engine.name]
        formats = f"({', '.join(engine.formats)})"
        if engine.missing:
            checks.append(Check(name, None, f"{engine.missing} {formats}", engine.fix))
        else:
            checks.append(Check(name, True, f"{engine.found} {formats}"))
    return checks


def _packages() -> list[Check]:
    names = ("transformers", "trl", "peft", "accelerate", "inspect_ai")
    checks = [Check(name, True, version(name)) for name in names]
    optional = {
        "vllm": "pip install vllm (fast serving on a GPU)",
        "bitsandbytes": "pip install 'trimtab[quantised]' (QLoRA)",
    }
    for name, fix in optional.items():
        if importlib.util.find_spec(name) is None:
            checks.append(Check(name, None, "not installed", fix))
            continue
        try:
            checks.append(Check(name, True, version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, None, "found, without a version", fix))
    return checks
