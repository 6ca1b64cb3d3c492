"""Which renderers this machine has, how to install the others, and the versions that a cached picture depends on."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from trimtab.demo_model import cache_dir
from trimtab.structeval import sandbox
from trimtab.structeval.render.launch import find_browser
from trimtab.structeval.render.workers import RenderError

SOURCE = Path(__file__).parent / "node"
PACKAGES = {  # engine -> modules that it imports
    "browser": ("playwright", "PIL"),
    "svg": ("resvg_py", "PIL", "lxml"),
    "typst": ("typst", "pypdfium2", "PIL"),
    "vega": ("vl_convert", "PIL", "lxml"),
    "plot": ("matplotlib", "PIL"),
    "tex": ("pypdfium2", "PIL"),
}
DISTRIBUTIONS = {"PIL": "pillow", "resvg_py": "resvg-py", "vl_convert": "vl-convert-python"}
INSTALL_PACKAGES = "pip install 'trimtab[structeval]'"
INSTALL_BROWSER = "apt install chromium-headless-shell (or chromium, half as fast)"
INSTALL_TEX = (
    "apt install --no-install-recommends texlive-latex-base texlive-latex-recommended texlive-latex-extra "
    "texlive-pictures texlive-fonts-recommended texlive-science lmodern"
)
INSTALL_NODE = "apt install nodejs npm"
INSTALL_LIBRARIES = "trimtab doctor --install-renderers"
INSTALL_SANDBOX = "apt install bubblewrap"


class Engine(NamedTuple):
    """One renderer. ``missing`` empty: it is there, and ``found`` says what; ``fix`` installs what is missing."""

    name: str
    formats: tuple[str, ...]
    found: str
    missing: str
    fix: str


def libraries_folder() -> Path:
    """Where the JavaScript files are, or will be: a folder for each state of the lock file and of what is built."""
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.is_file()))
    return cache_dir() / "renderers" / state.hexdigest()[:16]


def find_libraries() -> Path | None:
    """The folder with the JavaScript files, if they are installed."""
    folder = libraries_folder()
    return folder if (folder / "versions.json").is_file() else None


def install_libraries() -> Path:
    """Install the JavaScript files with npm from the lock file; needs a network, once.

    Raises RenderError if npm is absent or fails; then nothing is left behind.
    """
    target = libraries_folder()
    if find_libraries() is not None:
        return target
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise RenderError("node and npm are needed to install the JavaScript renderers", fix=INSTALL_NODE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name) / "work"
        shutil.copytree(SOURCE, work)
        for argv in (
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            [node, "build.mjs", str(Path(name) / "built")],
        ):
            done = subprocess.run(argv, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                seen = (done.stderr or done.stdout).strip()[-800:]
                raise RenderError(
                    f"{Path(argv[0]).name} {argv[1]} failed", seen=seen, fix="check the network and try again"
                )
        (Path(name) / "built").chmod(0o755)
        os.replace(Path(name) / "built", target)  # noqa: PTH105 - one step, so that a half-built folder is never seen
    return target


def engines() -> list[Engine]:
    """All renderers, present or not. Starts nothing."""
    return [
        _browser(),
        _node(),
        _python("svg", ("SVG",)),
        _tex(),
        _python("typst", ("Typst",)),
        _python("plot", ("Matplotlib",)),
        _python("vega", ("Vega",)),
    ]


def missing(name: str) -> str | None:
    """Why the engine cannot be used; None if it can."""
    engine = next(one for one in engines() if one.name == name)
    return f"{engine.missing}; {engine.fix}" if engine.missing else None


def _absent(name: str) -> list[str]:
    return [DISTRIBUTIONS.get(one, one) for one in PACKAGES[name] if importlib.util.find_spec(one) is None]


def _python(name: str, formats: tuple[str, ...]) -> Engine:
    absent = _absent(name)
    if absent:
        return Engine(name, formats, "", f"not installed: {', '.join(absent)}", INSTALL_PACKAGES)
    first = PACKAGES[name][0]
    distribution = DISTRIBUTIONS.get(first, first)
    return Engine(name, formats, f"{distribution} {version(distribution)}", "", "")


def _browser() -> Engine:
    formats = ("HTML", "Canvas", "Markdown", "React", "Vue", "Angular", "Mermaid")
    absent = _absent("browser")
    if absent:
        return Engine("browser", formats, "", f"not installed: {', '.join(absent)}", INSTALL_PACKAGES)
    program = find_browser()
    if program is None:
        return Engine("browser", formats, "", "no Chromium found", INSTALL_BROWSER)
    return Engine("browser", formats, program, "", "")


def _node() -> Engine:
    formats = ("React", "Vue", "Angular", "Mermaid")
    if shutil.which("node") is None:
        return Engine("node", formats, "", "node not found", f"{INSTALL_NODE}; {INSTALL_LIBRARIES}")
    folder = find_libraries()
    if folder is None:
        return Engine("node", formats, "", "JavaScript libraries not installed", INSTALL_LIBRARIES)
    return Engine("node", formats, str(folder), "", "")


def _tex() -> Engine:
    base = _python("tex", ("LaTeX", "TikZ"))
    program = shutil.which("pdflatex")
    if base.missing:
        return base
    if program is None:
        return Engine("tex", base.formats, "", "pdflatex not found", INSTALL_TEX)
    absent = [name for name in ("standalone.cls", "pgfplots.sty", "mathtools.sty", "lmodern.sty") if not _tex_has(name)]
    if absent:
        return Engine("tex", base.formats, "", f"TeX has no {', '.join(absent)}", INSTALL_TEX)
    return Engine("tex", base.formats, program, "", "")


@functools.cache
def _tex_has(name: str) -> bool:
    finder = shutil.which("kpsewhich")
    return finder is not None and subprocess.run([finder, name], capture_output=True, check=False).returncode == 0


def sandbox_state() -> tuple[bool, str, str]:
    """Whether text of a model runs isolated; what was found; how to mend it."""
    found = sandbox.isolation()
    if found.level == "bwrap":
        return True, "bubblewrap works: no network, no files of yours", ""
    fix = f"{INSTALL_SANDBOX}; inside a container allow user namespaces, or use a disposable machine"
    return False, f"{found.why}; Matplotlib stays unscored", fix


def refused_python() -> str | None:
    """Why a model's Python is not run on this machine; None where it runs in a sandbox."""
    found = sandbox.isolation()
    if found.level == "bwrap":
        return None
    return (
        f"a model's Python is not run without a sandbox: {found.why}; {INSTALL_SANDBOX}, or on a machine that may be "
        "lost pass --unsandboxed-python"
    )


@functools.cache
def versions() -> dict[str, str]:
    """What a picture depends on, for a cache key and for the report."""
    found = {}
    for modules in PACKAGES.values():
        for module in modules:
            name = DISTRIBUTIONS.get(module, module)
            if importlib.util.find_spec(module) is not None:
                found[name] = version(name)
    folder = find_libraries()
    if folder is not None:
        found |= json.loads((folder / "versions.json").read_text())
    for name, program in (("chromium", find_browser()), ("pdflatex", shutil.which("pdflatex"))):
        if program is not None:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            found[name] = done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
    return found
