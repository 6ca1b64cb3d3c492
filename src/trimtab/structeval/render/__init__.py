"""Draw what a model wrote, in a sandbox: warm programs, used again and again, formats side by side."""

from trimtab.structeval.formats.jobs import Rendered
from trimtab.structeval.render.renderer import Renderer
from trimtab.structeval.render.workers import RenderError


def version() -> str:
    """What a picture depends on: our version and those of all programs and libraries; part of a store's keys."""
    import json
    from importlib.metadata import version as installed

    from trimtab.structeval.render.availability import versions

    return json.dumps({"trimtab": installed("trimtab"), **versions()}, sort_keys=True)


__all__ = ["RenderError", "Rendered", "Renderer", "version"]
