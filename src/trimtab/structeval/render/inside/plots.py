"""Matplotlib inside the sandbox: the worker has it imported and forks one short-lived child for each script.

The child gets its own process namespace where the system allows, so that it can neither see nor signal the worker and
dies with all it started; without namespaces the worker adopts and ends what it left. Its limits are set before the
script runs; the picture is decoded and encoded anew before it leaves. Not covered: notebooks, backends with windows,
animations (their first frame is drawn).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from trimtab.structeval.processes import descendants
from trimtab.structeval.render.inside.pictures import MAX_PAGES, decode, encode
from trimtab.structeval.render.inside.serve import Answer, failed
from trimtab.structeval.sandbox import patience

CPU_SECONDS = 10
WALL_SECONDS = 12
MEMORY = 2 * 2**30
FILE_SIZE = 20 * 2**20
PROCESSES = 32
NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x08000000  # user, process, IPC
NOT_DUMPABLE = 4  # prctl: nobody may attach to this process
ADOPTS = 36  # prctl: what a child of this process leaves behind becomes its child


def plot(text: str) -> Answer:
    """Run the script; the picture is what its open figures show, or the PNG files that it saved and closed."""
    _import_all()
    ctypes.CDLL(None).prctl(NOT_DUMPABLE, 0, 0, 0, 0)
    ctypes.CDLL(None).prctl(ADOPTS, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        child = os.fork()
        if child == 0:
            _child(text, folder)
        in_time = _wait(child)
        _end_the_rest()
        if not in_time:
            return failed("the script was stopped: it took too long")
        return _collect(folder)


def _import_all() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.colors
    import matplotlib.dates
    import matplotlib.gridspec
    import matplotlib.patches
    import matplotlib.pyplot
    import matplotlib.ticker
    import numpy as np  # noqa: F401


def _wait(child: int) -> bool:
    """Until the child ends or its time is over, when it and its group are killed."""
    end = time.monotonic() + WALL_SECONDS * patience()
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            _kill_group(child)
            return True
        time.sleep(0.004)
    _kill_group(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _end_the_rest() -> None:
    """Whatever the script left in other process groups. A process that forks faster than this is ended in rounds."""
    for _ in range(20):
        left = descendants(os.getpid())[1:]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _child(text: str, folder: Path) -> None:
    """Never returns."""
    os.setsid()
    separate = ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACES) == 0
    if separate:
        inner = os.fork()
        if inner:  # this one only waits; ``inner`` is the first process of its namespace, which ends with it
            os.waitpid(inner, 0)
            os._exit(0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    try:
        _limit()
        _script(text, folder)
    finally:
        os._exit(0)


def _limit() -> None:
    for what, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        resource.setrlimit(what, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error in the script, not a death


def _script(text: str, folder: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.closerange(3, 256)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(HOME=str(folder), MPLBACKEND="Agg", TMPDIR=str(folder))
    (folder / "started").touch()
    errors = []
    import matplotlib.pyplot as plt

    plt.close("all")
    try:
        exec(compile(text, "plot.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - this is what the sandbox is for
    except SystemExit as stop:
        if stop.code not in (None, 0):
            errors.append(f"SystemExit: {stop.code}")
    except BaseException as error:  # noqa: BLE001 - whatever the script raises is the result
        lines = [
            f"line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "plot.py"
        ]
        errors.append(f"{type(error).__name__}: {error}" + (f" ({lines[-1]})" if lines else ""))
    words = []
    try:
        words = _draw(folder)
    except Exception as error:  # noqa: BLE001 - drawing runs what the script left in its figures
        errors.append(f"{type(error).__name__} while drawing: {error}")
    sys.setrecursionlimit(1_000)
    (folder / "result.json").write_text(json.dumps({"errors": errors, "words": words}))


def _draw(folder: Path) -> list[str]:
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    words = []
    for index, number in enumerate(plt.get_fignums()[:MAX_PAGES]):
        figure = plt.figure(number)
        width, height = figure.get_size_inches()
        figure.savefig(folder / f"figure-{index}.png", dpi=min(100.0, 3_000 / max(width, height)))
        words += [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    return [word for word in words if word.strip()]


def _collect(folder: Path) -> Answer:
    """What the child left; all of it may be forged, and none of it is trusted."""
    if not (folder / "started").is_file():
        return failed("the script could not be started")
    try:
        result = json.loads(_read(folder / "result.json") or b"null")
        errors = tuple(str(error) for error in result["errors"])
        words = "\n".join(str(word) for word in result["words"])
    except (ValueError, TypeError, KeyError):
        return failed("the script ended before it was done (a limit of time or memory, or os._exit)")
    files = sorted(folder.glob("figure-*.png")) or sorted(folder.glob("*.png"), key=lambda path: path.lstat().st_mtime)
    images = []
    for path in files[:MAX_PAGES]:
        data = _read(path)
        try:
            images.append(decode(data or b""))
        except (ValueError, OSError, SyntaxError) as error:
            errors += (f"{path.name} is no picture: {error}",)
    if not images:
        return failed(*(errors or ("the script drew no figure",)))
    picture = encode(images, cut=False)
    return Answer(picture.png, words, errors, picture.blank)


def _read(path: Path) -> bytes | None:
    """A plain file of bounded size; never through a link."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(number, "rb") as stream:
        return stream.read(FILE_SIZE + 1)
