"""Where bubblewrap is absent: what is drawn, what is refused, which limits hold, and that a warning says so.

The level is forced; on a machine with bubblewrap these texts therefore run without it. They are ours and harmless.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.structeval.test_render_cases import SMALL, skip_unless_available

from trimtab.structeval import processes, sandbox
from trimtab.structeval.formats import FORMATS
from trimtab.structeval.render import Rendered, Renderer, availability, launch, renderer, workers
from trimtab.structeval.show import show

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.structeval.sandbox.SandboxWarning")
PYTHON = "import matplotlib.pyplot as plt\nplt.plot([1])\n"


@pytest.fixture(scope="module", autouse=True)
def weak() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("limits", "bubblewrap is not installed"))
    launch.browser_command.cache_clear()
    sandbox.warn_if_weak.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sandbox.SandboxWarning)
        yield
    patch.undo()
    launch.browser_command.cache_clear()
    sandbox.warn_if_weak.cache_clear()


@pytest.fixture(scope="module")
def careful() -> Iterator[Renderer]:
    with Renderer(workers=1) as one:
        yield one


@pytest.fixture(scope="module")
def bold() -> Iterator[Renderer]:
    with Renderer(workers=1, unsandboxed_python=True) as one:
        yield one


def plot(bold: Renderer, script: str) -> Rendered:
    skip_unless_available("Matplotlib")
    return bold.render("Matplotlib", PYTHON + script)


def alive(mark: str) -> int:
    """Processes whose command line has the mark."""
    count = 0
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        count += mark.encode() in words and int(folder.name) != os.getpid()
    return count


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "Matplotlib"])
def test_what_is_no_python_is_drawn(careful: Renderer, name: str) -> None:
    skip_unless_available(name)
    text, words = SMALL[name]
    drawn = careful.render(name, text)
    assert (drawn.status, drawn.errors) == ("rendered", ())
    assert words in drawn.text


def test_the_warning_is_loud(capsys: pytest.CaptureFixture[str]) -> None:
    sandbox.warn_if_weak.cache_clear()
    with pytest.warns(sandbox.SandboxWarning, match="NO SANDBOX: bubblewrap is not installed"):
        sandbox.kill(sandbox.spawn(["true"]))
    assert "Stop here unless this machine is disposable" in capsys.readouterr().err


def test_python_is_refused_and_not_run(careful: Renderer, tmp_path: Path) -> None:
    skip_unless_available("Matplotlib")
    drawn = careful.render("Matplotlib", PYTHON + f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (drawn.status, drawn.png) == ("unavailable", None)
    assert "apt install bubblewrap" in drawn.errors[0] and "--unsandboxed-python" in drawn.errors[0]
    assert not (tmp_path / "ran").exists()
    assert show(PYTHON, "matplotlib").status == "unavailable"
    isolated, found, fix = availability.sandbox_state()
    assert not isolated and "Matplotlib stays unscored" in found and "bubblewrap" in fix


def test_python_runs_where_the_user_asks_for_it(bold: Renderer) -> None:
    drawn = plot(bold, "plt.title('asked for')")
    assert (drawn.status, drawn.errors) == ("rendered", ())
    assert "asked for" in drawn.text


def test_memory_is_limited(bold: Renderer) -> None:
    drawn = plot(bold, "a = bytearray(4 * 2**30)")
    assert drawn.status == "failed" and "MemoryError" in drawn.errors[0]


def test_files_are_limited(bold: Renderer) -> None:
    drawn = plot(bold, "open('big', 'wb').write(bytes(50 * 2**20))")
    assert drawn.status == "failed" and "File too large" in drawn.errors[0]


def test_what_a_script_leaves_running_is_ended(bold: Renderer) -> None:
    mark = uuid.uuid4().hex
    script = (
        "import subprocess, sys\n"
        "for _ in range(3): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', "
        f"{mark!r}], start_new_session=True)"
    )
    assert plot(bold, script).status == "rendered"
    assert alive(mark) == 0


def test_a_script_that_sleeps_is_stopped(bold: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renderer.SECONDS, "plot", 2.0)
    monkeypatch.setattr(sandbox, "patience", lambda: 1.0)
    mark, began = uuid.uuid4().hex, time.monotonic()
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])"
    drawn = plot(bold, script)
    assert drawn.status == "failed" and "stopped after 2 s" in drawn.errors[0]
    assert time.monotonic() - began < 30
    assert alive(mark) == 0
    monkeypatch.setitem(renderer.SECONDS, "plot", 60.0)
    assert plot(bold, "").status == "rendered"


def test_secrets_of_the_environment_are_not_passed_on(bold: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_SECRET", "quartz")
    process = sandbox.spawn(["env"])
    assert process.stdout is not None
    assert b"quartz" not in process.stdout.read()
    sandbox.kill(process)
    script = launch.browser_command().script if launch.find_browser() else ""
    assert not script or " -i " in Path(script).read_text()


def test_the_private_folder_is_removed() -> None:
    process = sandbox.spawn(["sh", "-c", "echo x > left; pwd"])
    assert process.stdout is not None
    folder = Path(process.stdout.readline().decode().strip())
    assert "trimtab-sandbox-" in folder.name
    sandbox.kill(process)
    assert not folder.exists()


def flooding_worker(script: str) -> workers.Worker:
    """A worker that says it is ready, and then does as ``script`` says on every request."""
    ready = "printf '\\000\\000\\000\\002{}'; head -c 4 > /dev/null; "
    return workers.Worker("test", lambda: sandbox.spawn(["sh", "-c", ready + script]))


def test_too_many_processes_are_ended() -> None:
    mark = f"600.{os.getpid()}"
    script = f"for n in $(seq {workers.MAX_PROCESSES + 20}); do sleep {mark} & done; wait"
    with pytest.raises(workers.WorkerFailed, match="processes"):
        flooding_worker(script).call({"text": ""}, 10)
    assert alive(f"sleep\0{mark}") == 0


def test_too_much_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_RESIDENT", 60 * 2**20)
    code = "'a = bytearray(200 * 2**20); import time; time.sleep(600)'"
    with pytest.raises(workers.WorkerFailed, match="memory"):
        flooding_worker(f"exec {sys.executable} -c {code}").call({"text": ""}, 10)


def test_an_endless_answer_is_ended() -> None:
    with pytest.raises(workers.WorkerFailed, match="MiB"):
        flooding_worker("yes").call({"text": ""}, 10)


def test_usage_counts_what_a_program_started() -> None:
    process = sandbox.spawn(["sh", "-c", "sleep 600 & sleep 600 & echo; wait"])
    assert process.stdout is not None
    process.stdout.readline()
    used = processes.usage(process.pid)
    assert used.processes == 3 and 0 < used.resident < 100 * 2**20
    sandbox.kill(process)
    assert processes.usage(process.pid).resident == 0


def test_limits_are_set_without_a_limit_that_would_count_the_users_own_processes() -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("no prlimit on this machine")
    words = sandbox.command(["true"], limits=sandbox.Limits(cpu=5))
    assert "--cpu=5" in words and not any(word.startswith("--nproc") for word in words)
