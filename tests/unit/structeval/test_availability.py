"""What ``trimtab doctor`` says of the renderers, and what the sandbox says of itself."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from trimtab import doctor
from trimtab.structeval import sandbox
from trimtab.structeval.formats import FORMATS
from trimtab.structeval.render import RenderError, availability


def test_every_format_is_drawn_by_engines_that_doctor_names() -> None:
    names = {engine.name for engine in availability.engines()}
    assert names == set(doctor.ENGINES)
    assert {engine for form in FORMATS.values() for engine in form.needs} == names
    for engine in availability.engines():
        assert engine.found or (engine.missing and engine.fix)


@pytest.mark.parametrize(
    ("module", "engine", "distribution"),
    [("typst", "typst", "typst"), ("resvg_py", "svg", "resvg-py"), ("matplotlib", "plot", "matplotlib")],
)
def test_a_missing_package_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, module: str, engine: str, distribution: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    why = availability.missing(engine)
    assert why is not None
    assert distribution in why and "pip install 'trimtab[structeval]'" in why


@pytest.mark.parametrize(
    ("program", "check", "cure"),
    [
        ("pdflatex", "tex", "texlive-latex-extra"),
        ("node", "node", "trimtab doctor --install-renderers"),
        ("chromium", "chromium", "apt install chromium-headless-shell"),
    ],
)
def test_doctor_names_a_missing_program(monkeypatch: pytest.MonkeyPatch, program: str, check: str, cure: str) -> None:
    pytest.importorskip("playwright")
    pytest.importorskip("pypdfium2")
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, *a, **k: None if program in name or "chrom" in name else real(name)
    )
    found = {one.name: one for one in doctor._renderers()}[check]
    assert found.ok is None
    assert cure in found.fix


def test_installing_without_npm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None)
    with pytest.raises(RenderError, match="apt install nodejs npm"):
        availability.install_libraries()


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: f"/bin/{name}")
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RenderError, match="no network"):
        availability.install_libraries()
    assert list((tmp_path / "renderers").iterdir()) == []
    assert availability.find_libraries() is None


def test_the_lock_file_names_no_registry() -> None:
    lock = (availability.SOURCE / "package-lock.json").read_text()
    assert '"resolved"' not in lock


def test_without_bubblewrap_there_is_a_loud_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("limits", "bubblewrap is not installed"))
    sandbox.warn_if_weak.cache_clear()
    with pytest.warns(sandbox.SandboxWarning, match="NO SANDBOX"):
        sandbox.warn_if_weak()
    assert "NO SANDBOX" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sandbox.warn_if_weak()  # once is enough
    sandbox.warn_if_weak.cache_clear()
    isolated, _, fix = availability.sandbox_state()
    assert not isolated and "bubblewrap" in fix


def test_the_weak_level_still_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("no prlimit on this machine")
    words = sandbox.command(["true"], level="limits", limits=sandbox.Limits(cpu=5, memory=2**30))
    assert words[0] == "prlimit" and words[-1] == "true"
    assert "--cpu=5" in words and f"--as={2**30}" in words


def test_a_sandboxed_program_sees_no_home_and_no_network(tmp_path: Path) -> None:
    if sandbox.isolation().level != "bwrap":
        pytest.skip(f"no sandbox on this machine: {sandbox.isolation().why}")
    (tmp_path / "mine").write_text("secret")
    script = f"cat {tmp_path}/mine; ls -d /home/* ~root/* 2>/dev/null; cat /proc/net/dev | grep -c eth; echo over"
    process = sandbox.spawn(["sh", "-c", script])
    assert process.stdout is not None
    assert process.stdout.read().split() == [b"0", b"over"]
    sandbox.kill(process)


def test_patience_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (10_000.0, 0.0, 0.0))
    assert sandbox.patience() == 6.0
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert sandbox.patience() == 1.0
