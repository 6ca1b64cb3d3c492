"""How each warm program is started: which file, in which sandbox. No text of a model passes through here."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import trimtab
from trimtab.structeval import sandbox
from trimtab.structeval.processes import descendants, resident_bytes

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
LOW_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLCONFIGDIR": "/tmp/matplotlib"}  # noqa: S108
WORKER_LIMITS = sandbox.Limits(file_size=100 * 2**20, processes=256, open_files=1_024)
BROWSER_LIMITS = sandbox.Limits(file_size=200 * 2**20, processes=2_048, open_files=8_192)
PAGE_ARGUMENTS = [
    "--disable-gpu",
    "--force-color-profile=srgb",
    "--disable-features=OriginKeyedProcessesByDefault,Translate,PaintHolding,WebRtcHideLocalIpsWithMdns",
    "--js-flags=--max-old-space-size=768",
    "--proxy-server=127.0.0.1:9",  # nothing listens there: a second lock on the door where there is no namespace
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking",
    "--no-first-run",
]


class BrowserCommand(NamedTuple):
    """``script`` takes Chromium's arguments; ``own_sandbox``: Chromium's own sandbox works inside ours."""

    script: str
    arguments: list[str]
    own_sandbox: bool


def find_browser() -> str | None:
    """The program itself: TRIMTAB_CHROMIUM, or the first on the path; a shell without windows is twice as fast."""
    chosen = os.environ.get("TRIMTAB_CHROMIUM")
    names = (chosen,) if chosen else BROWSERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        return None
    # Debian's starter scripts read the user's settings; what they start is in /usr/lib/chromium.
    direct = Path("/usr/lib/chromium") / Path(found).name
    return str(direct) if direct.is_file() and os.access(direct, os.X_OK) else found


@functools.lru_cache(maxsize=1)
def browser_command() -> BrowserCommand:
    """A small script that starts the browser in the sandbox, because the driver starts exactly one file."""
    program = find_browser()
    if program is None:
        raise FileNotFoundError("no Chromium")
    sandbox.warn_if_weak()
    folder = Path(tempfile.mkdtemp(prefix="trimtab-browser-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    weak = sandbox.isolation().level == "limits"
    # Chromium refuses its own sandbox to root; inside bubblewrap it never is root.
    own_sandbox = _namespaces_inside() and not (weak and os.geteuid() == 0)
    words = sandbox.command([program], readable=[Path(program).resolve().parent], limits=BROWSER_LIMITS)
    if weak:  # bubblewrap clears the environment and gives a home of its own; here this does
        clean = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LANG": "C.UTF-8"}
        words = ["env", "-i", *(f"{name}={value}" for name, value in clean.items()), *words]
    script = folder / "browser"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)
    return BrowserCommand(str(script), PAGE_ARGUMENTS, own_sandbox)


def _namespaces_inside() -> bool:
    argv = sandbox.command(["unshare", "--user", "--pid", "--fork", "true"])
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def start_python(kind: str) -> subprocess.Popen[bytes]:
    """A worker of ``inside/serve.py``."""
    argv = [sys.executable, "-I", "-B", "-m", "trimtab.structeval.render.inside.serve", kind]
    package = Path(trimtab.__file__).resolve().parent
    readable = [*sandbox.python_paths(), package]
    return sandbox.spawn(argv, readable=readable, limits=WORKER_LIMITS, environment=LOW_THREADS)


def start_compiler(libraries: Path) -> subprocess.Popen[bytes]:
    """Node with Babel, the Vue compiler and TypeScript."""
    node = shutil.which("node") or "node"
    argv = [node, "--max-old-space-size=768", str(libraries / "compile.cjs")]
    real = Path(node).resolve()
    return sandbox.spawn(argv, readable=[libraries, real.parent.parent], limits=WORKER_LIMITS)


def kill_large_pages(limit: int) -> None:
    """End those of our browser's page processes that hold more than ``limit`` bytes."""
    for pid in descendants(os.getpid())[1:]:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"--type=renderer" in words and resident_bytes(pid) > limit:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
