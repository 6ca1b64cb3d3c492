"""Approximations as a policy is trained under them: what has no derivative gets that of what it stands for.

Forward it is the approximation, to the bit. Backward it is itself where it has a derivative (sparsity, polynomials),
and the exact function where it has none: x -> x for a rounded input (straight through, Bengio et al. 2013), the model's
own activation, exponential or 1/sqrt for tables and fixed point in their place (Iron). Else no gradient would pass.

Covered: every technique; which of the two a function is, by trying it on a row of numbers. Not covered: learning what
an approximation is made of (scales, thresholds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.approximation.apply import edits_of
from trimtab.approximation.noise import Noise
from trimtab.approximation.sites import LayerSites, Site
from trimtab.approximation.technique import Edit, Subject, Technique

Function = Callable[[Tensor], Tensor]

PROBE, FLAT = 64, 0.1  # numbers tried; share of them above which a function without a derivative there rounds
_RANGES: dict[Site, tuple[float, float]] = {"softmax": (-4.0, 0.0), "norm": (4.0, 400.0)}  # what the site is given


def trainable_edits(techniques: Sequence[Technique], subject: Subject) -> list[Edit]:
    """The edits of techniques, in order, each with a derivative; noise as published.

    Raises:
        UsageError, ApproximationError: as ``edits_of``.
    """
    layers = {layer.index: layer for layer in subject.layers}
    return [
        edit if isinstance(technique, Noise) else straight_through(edit, exact_function(edit.site, layers[edit.layer]))
        for technique in techniques
        for edit in edits_of(technique, subject)
    ]


def exact_function(site: Site, layer: LayerSites) -> Function:
    """What a site's edits stand for; none of the hooks on the model act in it."""
    exact: dict[Site, Function] = {"activation": layer.activation.forward, "softmax": torch.exp, "norm": torch.rsqrt}
    return exact.get(site, unchanged)


def unchanged(x: Tensor) -> Tensor:
    """x itself: what rounding and sparsity stand for."""
    return x


def straight_through(edit: Edit, exact: Function = unchanged) -> Edit:
    """The edit itself where its function has a derivative, else with that of the exact function."""
    if not _steps(edit):
        return edit

    def through(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = edit.function(x)
        smooth = exact(x)
        return value + (smooth - smooth.detach())  # adds 0, so the value is kept to the bit

    return edit._replace(function=through)


def _steps(edit: Edit) -> bool:
    """Whether a function gives values other than 0 where its derivative is 0.

    The derivative alone does not tell: that of sparsity is rightly 0 where it gives 0, and rounding has one where its
    row's largest value is.
    """
    low, high = _RANGES.get(edit.site, (-2.0, 2.0))
    x = torch.linspace(low, high, PROBE).reshape(1, 1, PROBE).requires_grad_(True)
    with torch.enable_grad():
        try:
            value = edit.function(x)
        except RuntimeError:  # it is made for the site's own width: scales for each channel, before rounding
            return True
        slope = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
    return float(((value != 0) & (slope == 0)).float().mean()) > FLAT
