"""Run a program on text that a model wrote: no network, none of the user's files, limited time, memory and output.

Two levels, found once per process by trying:

``bwrap``   bubblewrap: own network, process and mount namespaces, a read-only system, no home, a private ``/tmp``.
            Started by root it also becomes a user of its own, because the kernel does not limit root's processes and
            counts the processes of a user in all sandboxes together.
``limits``  no namespaces to be had: resource limits, a private directory, an empty environment and a watch over
            memory and the number of processes only. A program can then still read what the user can read and reach
            the network; a warning says so, once. Python of a model is not run at this level unless the user asks.

Not covered: a kernel bug, side channels, and programs on systems other than Linux beyond the second level.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from trimtab.structeval.processes import kill_all

FIRST_USER = 2_000_000_000  # far above any real user
_counter = itertools.count()
_folders: dict[int, str] = {}  # of programs at the weak level, by process
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
CONFIGURATION = (
    "/etc/fonts",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/texmf",
    "/var/lib/texmf",
    "/etc/chromium.d",
)


class SandboxWarning(UserWarning):
    """What a model wrote runs with less protection than it should."""


class Isolation(NamedTuple):
    """``level`` and, for ``limits``, why bubblewrap cannot be used."""

    level: Literal["bwrap", "limits"]
    why: str


@dataclass(frozen=True)
class Limits:
    """None: no limit of that kind. ``cpu`` in seconds of processor time, ``memory`` in bytes of address space."""

    cpu: int | None = None
    memory: int | None = None
    file_size: int | None = 20 * 2**20
    processes: int | None = 64
    open_files: int | None = 256


@functools.lru_cache(maxsize=1)
def isolation() -> Isolation:
    """Which level this machine has; runs ``true`` inside bubblewrap to find out."""
    if shutil.which("bwrap") is None:
        return Isolation("limits", "bubblewrap is not installed (apt install bubblewrap)")
    argv = command(["true"], level="bwrap")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation("limits", f"bubblewrap does not start: {error}")
    if done.returncode:
        return Isolation("limits", f"bubblewrap does not work here: {done.stderr.strip()[:200]}")
    return Isolation("bwrap", "")


@functools.lru_cache(maxsize=1)
def warn_if_weak() -> None:
    """Say once, loudly, that there are no namespaces."""
    found = isolation()
    if found.level == "limits":
        message = (
            f"NO SANDBOX: {found.why}. Text that a model wrote is about to be executed with resource limits only: it "
            "can read your files and reach your network. Stop here unless this machine is disposable."
        )
        warnings.warn(message, SandboxWarning, stacklevel=3)
        print(f"\n*** {message}\n", file=sys.stderr)


def patience() -> float:
    """By how much limits of wall time are stretched: the load of the machine for each core, from 1 to 6.

    A text must not fail because other programs keep the processors busy. Limits of processor time are not stretched.
    """
    try:
        load = os.getloadavg()[0]
    except OSError:
        return 1.0
    return min(max(load / (os.cpu_count() or 1), 1.0), 6.0)


def python_paths() -> tuple[Path, ...]:
    """Folders that this interpreter and its packages need to be readable."""
    here = Path(__file__).resolve().parent
    wanted = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent, here]
    return tuple(dict.fromkeys(wanted))


def command(
    argv: Sequence[str],
    *,
    readable: Sequence[Path] = (),
    limits: Limits = Limits(),
    level: Literal["bwrap", "limits"] | None = None,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """``argv`` wrapped for the level of this machine; ``readable`` folders are bound read-only at their own place."""
    level = level or isolation().level
    inner = [*_prlimit(limits, level), *argv]
    if level == "limits":
        return inner
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **(environment or {})}  # noqa: S108
    root = os.geteuid() == 0
    wrapped = ["bwrap", "--die-with-parent", "--new-session", "--unshare-net", "--unshare-pid", "--unshare-ipc"]
    wrapped += ["--unshare-uts", "--unshare-cgroup-try", *([] if root else ["--unshare-user"]), "--clearenv"]
    for name, value in variables.items():
        wrapped += ["--setenv", name, value]
    for folder in SYSTEM:
        if Path(folder).is_symlink():
            wrapped += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            wrapped += ["--ro-bind", folder, folder]
    bound = [path for path in readable if not _inside(path, SYSTEM)]
    wrapped += _parents([Path(folder) for folder in CONFIGURATION] + bound)
    for folder in CONFIGURATION:
        wrapped += ["--ro-bind-try", folder, folder]
    wrapped += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp", "--perms", "1777"]  # noqa: S108
    wrapped += ["--tmpfs", "/dev/shm"]  # noqa: S108
    for path in bound:
        wrapped += ["--ro-bind", str(path), str(path)]
    wrapped += ["--chdir", "/tmp"]  # noqa: S108
    user = FIRST_USER + os.getpid() % 100_000 * 1_000 + next(_counter) % 1_000
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return [*wrapped, "--", *(drop if root else []), *inner]


def _parents(paths: Sequence[Path]) -> list[str]:
    """Folders above ``paths``, empty but passable: bubblewrap would make them for root's eyes only."""
    above = {str(parent) for path in paths for parent in path.parents} - {"/", *SYSTEM}
    return [word for folder in sorted(above) for word in ("--perms", "0755", "--dir", folder)]


def _inside(path: Path, folders: Sequence[str]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _prlimit(limits: Limits, level: str) -> list[str]:
    if shutil.which("prlimit") is None:
        return []
    options = {
        "cpu": limits.cpu,
        "as": limits.memory,
        "fsize": limits.file_size,
        "nproc": limits.processes,
        "nofile": limits.open_files,
        "core": 0,
    }
    if level == "limits" or not _counts_apart():
        options["nproc"] = None
    return ["prlimit", *(f"--{name}={value}" for name, value in options.items() if value is not None), "--"]


def _counts_apart() -> bool:
    """Whether a limit on processes counts one sandbox only: a user of its own, or a user namespace since Linux 5.14.

    Otherwise it would count everything that the user runs, and nothing could be started; then only the watch over each
    worker counts.
    """
    if shutil.which("bwrap") is None:
        return False
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return os.geteuid() == 0 or (found is not None and (int(found[1]), int(found[2])) >= (5, 14))


def spawn(
    argv: Sequence[str],
    *,
    readable: Sequence[Path] = (),
    limits: Limits = Limits(),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a sandboxed program with pipes; its own process group, so that :func:`kill` ends all of it."""
    warn_if_weak()
    level = isolation().level
    folder = None if level == "bwrap" else tempfile.mkdtemp(prefix="trimtab-sandbox-")
    clean = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **(environment or {})}
    if folder:
        clean |= {"HOME": folder, "TMPDIR": folder}
    process = subprocess.Popen(
        command(argv, readable=readable, limits=limits, environment=environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder or "/",
        env=clean,
        start_new_session=True,
    )
    if folder:
        _folders[process.pid] = folder
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the program and all it started, remove its folder; with bubblewrap its namespace dies with it."""
    kill_all(process.pid)
    process.wait()
    if (folder := _folders.pop(process.pid, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
    for stream in (process.stdin, process.stdout):
        _close(stream)


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):  # something was still buffered for a program that is gone
            stream.close()
