"""LaTeX inside the sandbox: pdflatex without shell, reading and writing only in its own folder; then a picture."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

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


def tex(text: str) -> Answer:
    """Compile a whole document. Stops at the first error, because a page that TeX guessed is not what was written."""
    from trimtab.structeval.render.inside.pictures import encode, pdf_pages

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.tex").write_text(text, encoding="utf-8")
        for _ in range(2):
            trouble = _run(folder)
            log = _log(folder)
            if trouble or not any(mark in log for mark in RERUN):
                break
        pdf = folder / "main.pdf"
        if trouble or not pdf.is_file():
            return failed(trouble or "no page of output")
        images, words = pdf_pages(pdf.read_bytes())
    picture = encode(images, cut=True)
    return Answer(picture.png, words, (), picture.blank)


def _run(folder: Path) -> str:
    """One pass; the error, or nothing."""
    argv = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
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
    return _first_error(_log(folder)) or f"pdflatex ended with {code} (a limit of time or file size?)"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


def _log(folder: Path) -> str:
    try:
        with (folder / "main.log").open(encoding="utf-8", errors="replace") as stream:
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
