"""Matplotlib, Mermaid, Vega and Vega-Lite.

A Vega specification that loads data from an address is refused: without a network its chart would be empty without an
error, and so would the picture that is judged.
"""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from trimtab.structeval.formats.base import UNDECIDED, Checked, Format, bad
from trimtab.structeval.formats.jobs import Job, MermaidJob, WorkerJob

PARTS = ("mark", "marks", "layer", "hconcat", "vconcat", "concat", "facet", "repeat", "signals", "spec")


def _examine_matplotlib(text: str) -> Checked:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return bad(f"{type(error).__name__}: {error}")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    if not names and not imports:
        return bad("a program that does nothing")
    return Checked(None, None, tree)


def _plan_matplotlib(text: str) -> Job:
    return WorkerJob("plot", text)


def _examine_mermaid(_text: str) -> Checked:
    return UNDECIDED


def _plan_mermaid(text: str) -> Job:
    return MermaidJob(text.strip())


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _examine_vega(text: str) -> Checked:
    try:
        spec = json.loads(text, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        return bad(f"not JSON: {error}")
    if not isinstance(spec, dict):
        return bad("the specification is not an object")
    if not any(part in spec for part in PARTS):
        return bad("no marks in the specification")
    address = _address(spec)
    if address is not None:
        return bad(f"loads data from an address, which is not allowed: {address[:200]}")
    return Checked(None, None, spec)


def _address(node: object) -> str | None:
    """The first ``url`` in a data definition, anywhere. Inline pictures (``data:``) load nothing."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            url = one.get("url")
            if isinstance(url, str) and not url.startswith("data:"):
                return url
            if isinstance(url, dict) and "signal" in url:
                return str(url["signal"])
            waiting += [value for key, value in one.items() if key != "values"]
        elif isinstance(one, list):
            waiting += one
    return None


def _plan_vega(text: str) -> Job:
    return WorkerJob("vega", text)


MATPLOTLIB = Format("Matplotlib", _examine_matplotlib, _plan_matplotlib, ("plot",))
MERMAID = Format("Mermaid", _examine_mermaid, _plan_mermaid, ("browser", "node"))
VEGA = Format("Vega", _examine_vega, _plan_vega, ("vega",))
