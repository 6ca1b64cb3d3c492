"""LaTeX inside the sandbox: pdflatex without shell, reading and writing only in its own folder; then a picture.

A preamble of ours that comes a second time is loaded once and kept as a TeX format (a memory image): most of the time
of a small drawing is the loading of its packages. TeX cannot write to that file: it lies outside of the folder of the
text. A format that cannot be made is not used; the text is then compiled as it is.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from trimtab.structeval.formats.papers import PREAMBLES
from trimtab.structeval.render.inside.serve import Answer, failed
from trimtab.structeval.sandbox import patience

WALL_SECONDS = 12
CPU_SECONDS = 10
RERUN = ("Rerun to get", "There were undefined references", "No file main.toc")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "openin_any": "p",  # paranoid: no absolute paths, nothing above the folder, no dot files
    "openout_any": "p",
    "shell_escape": "f",
    "TEXMFHOME": "/nonexistent",
    "max_print_line": "1000",
    "LANG": "C.UTF-8",
}


OPTIONS = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]


class Source(NamedTuple):
    """A document, or what follows its preamble in ``form`` (a file)."""

    form: Path | None
    text: str


class Preambles:
    """The formats that this worker has made; a preamble has one from its second use on."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._uses: Counter[str] = Counter()
        self._forms: dict[str, Path | None] = {}

    def split(self, text: str) -> Source:
        """Take the preamble off where a format does its work."""
        preamble = next((one for one in PREAMBLES if text.startswith(one)), None)
        if preamble is None:
            return Source(None, text)
        self._uses[preamble] += 1
        if self._uses[preamble] == 2:
            self._forms[preamble] = self._make(preamble)
        form = self._forms.get(preamble)
        return Source(None, text) if form is None else Source(form, text.removeprefix(preamble))

    def _make(self, preamble: str) -> Path | None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="trimtab-preambles-"))
        name = f"preamble{len(self._forms)}"
        (self._folder / f"{name}.tex").write_text(preamble + "\\dump\n", encoding="utf-8")
        argv = ["pdftex", "-ini", *OPTIONS, f"-jobname={name}", "&pdflatex", f"{name}.tex"]
        trouble = _run(argv, self._folder, name)
        form = self._folder / f"{name}.fmt"
        return None if trouble or not form.is_file() else form


_preambles = Preambles()


def tex(text: str) -> Answer:
    """Compile a whole document. Stops at the first error, because a page that TeX guessed is not what was written."""
    from trimtab.structeval.render.inside.pictures import encode, pdf_pages

    source = _preambles.split(text)
    argv = ["pdflatex", *OPTIONS, *([f"-fmt={source.form}"] if source.form else []), "main.tex"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.tex").write_text(source.text, encoding="utf-8")
        for _ in range(2):
            trouble = _run(argv, folder, "main")
            log = _log(folder, "main")
            if trouble or not any(mark in log for mark in RERUN):
                break
        pdf = folder / "main.pdf"
        if trouble or not pdf.is_file():
            return failed(trouble or "no page of output")
        images, words = pdf_pages(pdf.read_bytes())
    picture = encode(images, cut=True)
    return Answer(picture.png, words, (), picture.blank)


def _run(argv: list[str], folder: Path, job: str) -> str:
    """One pass in ``folder``; the error, or nothing."""
    environment = ENVIRONMENT | {"HOME": str(folder), "TEXMFVAR": str(folder / "var")}
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_limit,
    )
    seconds = WALL_SECONDS * patience()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"TeX was stopped after {seconds:.0f} s"
    if code == 0:
        return ""
    return _first_error(_log(folder, job)) or f"{argv[0]} ended with {code} (a limit of time or file size?)"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


def _log(folder: Path, job: str) -> str:
    try:
        with (folder / f"{job}.log").open(encoding="utf-8", errors="replace") as stream:
            return stream.read(2_000_000)
    except FileNotFoundError:
        return ""


def _first_error(log: str) -> str:
    lines = log.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("!"):
            where = next((later for later in lines[index : index + 12] if later.startswith("l.")), "")
            return f"{line[2:].strip()} {where}".strip()[:500]
    return ""
