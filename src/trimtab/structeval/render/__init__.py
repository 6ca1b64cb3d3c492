"""Draw what a model wrote, in a sandbox: warm programs, used again and again, formats side by side."""

from trimtab.structeval.formats.jobs import Rendered
from trimtab.structeval.render.renderer import Renderer
from trimtab.structeval.render.workers import RenderError

__all__ = ["RenderError", "Rendered", "Renderer"]
