"""Refuse a model that was compiled before it is approximated: the compiled code would run on, exact, and say nothing.

PyTorch does not look for new hooks when it runs what it compiled (its guards on hooks are off by default).

Covered: ``torch.compile(model)``, ``model.compile()``, compiled submodules and forwards; a plain model of which a
compiled wrapper is alive, where anything was compiled in this process. Not covered: a forward compiled as a function of
its own and kept elsewhere.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import nn

from trimtab.errors import ApproximationError


def refuse_compiled(model: Any) -> None:
    """Raise where approximating this model (given bare, or wrapped by an adapter) would change nothing.

    Raises:
        ApproximationError: compiled; names where.
    """
    found = _compiled_part(model) or _wrapped_elsewhere(model)
    if found:
        raise ApproximationError(
            "this model is compiled already, and compiled code does not see an approximation",
            seen=found,
            fix="give the model as it was before torch.compile (drop the compiled one, and what the compiler keeps of "
            "it: torch.compiler.reset()); compile inside the `with` block, after approximating",
        )


def _compiled_part(model: Any) -> str:
    for name, module in model.named_modules():
        how = ""
        if _is_wrapper(module):
            how = "torch.compile(module)"
        elif getattr(module, "_compiled_call_impl", None) is not None:
            how = "module.compile()"
        elif hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            how = "a compiled forward"
        if how:
            return f"{name or 'the model itself'}: {type(module).__name__}, {how}"
    return ""


def _is_wrapper(module: nn.Module) -> bool:
    """What ``torch.compile`` returns for a module; its class is not imported, since that loads the compiler."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


def _wrapped_elsewhere(model: Any) -> str:
    """A live compiled wrapper around a module of a model that was given plain."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not getattr(dynamo, "counters", True):
        return ""  # nothing was compiled in this process, so the search below (a quarter of a second) is spared
    if not _held_as_compiled(model):
        return ""
    gc.collect()  # a dropped wrapper sits in reference cycles until the collector passes
    return "a compiled wrapper of this model is alive" if _held_as_compiled(model) else ""


def _held_as_compiled(model: Any) -> bool:
    return any(isinstance(one, dict) and one.get("_orig_mod") is model for one in gc.get_referrers(model))
