"""What a renderer is asked to do, and what comes out; plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CompilerKind = Literal["react", "vue", "angular"]
WorkerKind = Literal["typst", "vega", "svg", "tex", "plot"]


@dataclass(frozen=True)
class PageJob:
    """A document for the browser. ``waits``: it sets ``data-trimtab-done`` on its root element when it is done;
    ``must_mount``: an empty element ``root`` is an error; ``only``: the picture shows this element (a CSS selector)."""

    html: str
    waits: bool = False
    scripts: bool = True
    must_mount: bool = False
    only: str | None = None


@dataclass(frozen=True)
class CompileJob:
    """Source for the compiler in Node, whose result becomes a page."""

    kind: CompilerKind
    text: str


@dataclass(frozen=True)
class WorkerJob:
    """Text for a sandboxed worker that draws it without a browser."""

    kind: WorkerKind
    text: str


@dataclass(frozen=True)
class MermaidJob:
    """A diagram for the page that has Mermaid loaded."""

    text: str


Job = PageJob | CompileJob | WorkerJob | MermaidJob


@dataclass(frozen=True)
class Rendered:
    """One text, drawn.

    ``png`` may be there although ``status`` is "failed": it shows what was drawn before the error. ``text`` is what a
    reader sees. "unavailable": the renderer is not installed or does not start; that says nothing about the text and
    must be left unscored. ``seconds`` is wall time, without waiting for a free renderer.
    """

    format: str
    png: bytes | None
    text: str
    errors: tuple[str, ...]
    blank: bool
    status: Literal["rendered", "failed", "blank", "unavailable"]
    seconds: float
