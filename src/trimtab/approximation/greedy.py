"""TEAL's block-wise greedy rule: how much of a layer's sparsity each of its sites gets.

Each step saves equally many multiplications, at the site where the layer's output then errs least, until the layer's
mean sparsity is reached. Errors are measured by running the layer on recorded inputs.

Covered: the source's rule on our four sites (the inputs of q, k, v; of o; of gate, up; of down) instead of seven
projections. Not covered: more sparsity in one layer than in another (the source has none either).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.approximation.apply import installed
from trimtab.approximation.calibration import padded
from trimtab.approximation.sites import LayerSites, Site, evaluating, first_tensor
from trimtab.approximation.technique import Edit, Rows, Subject

Shares = dict[Site, float]
Cuts = Callable[[LayerSites, Shares, Rows], list[Edit]]
STEPS = 50  # each saves this part of a layer's multiplications
MOST = 0.99  # of a site, unless more is asked of all
TOKENS = 256  # read for it


def allocate(sizes: Mapping[Site, float], share: float, error: Callable[[Shares], float]) -> Shares:
    """The sparsity of each site; its mean over multiplications is ``share``.

    Args:
        sizes: multiplications behind each site.
        share: of a layer's multiplications that is saved.
        error: of the layer's output at some sparsities.

    The same share everywhere is taken where the greedy steps end in a larger error than that.
    """
    total, most = sum(sizes.values()), max(MOST, share)
    shares, now = dict.fromkeys(sizes, 0.0), 0.0
    while (missing := share * total - sum(shares[site] * size for site, size in sizes.items())) > 1e-9 * total:
        tried = []
        for site, size in sizes.items():
            saved = min(total / STEPS, missing, (most - shares[site]) * size)
            if saved > 1e-12 * total:
                after = {**shares, site: shares[site] + saved / size}
                found = error(after)
                tried.append(((found - now) / saved, found, after))
        _, now, shares = min(tried, key=lambda one: one[0])
    even = dict.fromkeys(sizes, share)
    return shares if now <= error(even) else even


def greedy_shares(subject: Subject, layers: Sequence[LayerSites], share: float, cuts: Cuts) -> dict[int, Shares]:
    """``allocate`` for each of some layers.

    Args:
        subject: the model, exact; its calibration rows are read.
        cuts: edits that zero a layer's sites at some sparsities, in all tokens.
    """
    batch, mask = padded([row[:TOKENS] for row in _some(subject.calibration().ids)])
    late = mask.bool() & (2 * mask.cumsum(1) > mask.sum(1, keepdim=True))
    found: dict[int, Shares] = {}
    with evaluating(subject.model), torch.no_grad():
        calls, chosen = _record(subject.model, layers, batch, mask)
        for layer in layers:
            error = _error_of(subject.model, layer, calls[layer.index], late, cuts)
            found[layer.index] = allocate(site_sizes(layer, chosen.get(layer.index)), share, error)
    return found


def _some(ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Rows of ``TOKENS`` together, at least one."""
    found: list[Sequence[int]] = []
    for row in ids:
        if sum(map(len, found)) < TOKENS:
            found.append(row)
    return found


def _record(
    base: Any, layers: Sequence[LayerSites], batch: Tensor, mask: Tensor
) -> tuple[dict[int, tuple[Any, Any]], dict[int, int]]:
    """What each layer is called with in one exact pass, and how many of its experts a token runs, by its index."""
    calls: dict[int, tuple[Any, Any]] = {}
    chosen: dict[int, int] = {}

    def noting(index: int) -> Callable[..., None]:
        def note(_: object, args: Any, kwargs: Any) -> None:
            calls[index] = (args, kwargs)

        return note

    def counting(index: int) -> Callable[..., None]:
        def count(_: object, args: Any, kwargs: Any) -> None:
            chosen[index] = _width_of_choice([*args, *kwargs.values()])

        return count

    handles = [layer.layer.register_forward_pre_hook(noting(layer.index), with_kwargs=True) for layer in layers]
    handles += [
        layer.mlp.register_forward_pre_hook(counting(layer.index), with_kwargs=True)
        for layer in layers
        if layer.experts
    ]
    try:
        base(input_ids=batch.to(base.device), attention_mask=mask.to(base.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return calls, chosen


def _width_of_choice(values: Sequence[Any]) -> int:
    """Experts a token is sent to, from what stacked experts are called with: configurations name that number in many
    ways, but the indices (tokens x experts a token) are the only whole numbers there."""
    return next(value.shape[-1] for value in values if isinstance(value, Tensor) and not value.is_floating_point())


def _error_of(
    base: Any, layer: LayerSites, call: tuple[Any, Any], late: Tensor, cuts: Cuts
) -> Callable[[Shares], float]:
    """Distance of the layer's output from the exact one over the later half of each row.

    The first tokens are left out, as in the source: some are attention sinks whose values drown all others.
    """
    args, kwargs = call

    def output(shares: Shares) -> Tensor:
        rows = Rows()
        with installed(base, [layer], cuts(layer, shares, rows), rows):
            seen: Any = first_tensor([layer.layer(*args, **kwargs)])
        kept: Tensor = seen[late.to(seen.device)].float()
        return kept

    exact = output({})
    return lambda shares: float((output(shares) - exact).norm())


def site_sizes(layer: LayerSites, chosen: int | None = None) -> dict[Site, float]:
    """Multiplications of a token behind each site: what all of its sparsity would save.

    Args:
        chosen: how many of the layer's experts a token runs; None: all.
    """
    groups: dict[Site, tuple[Any, ...]] = {
        "attn_in": layer.attention_in,
        "attn_out": (layer.attention_out,),
        "up": layer.up,
        "down": (layer.down,) if layer.down is not None else (),
    }
    sizes = {site: float(sum(part.in_features * part.out_features for part in parts)) for site, parts in groups.items()}
    if layer.experts:
        stacks: dict[Site, Any] = {"up": layer.mlp.gate_up_proj, "down": layer.mlp.down_proj}  # experts x out x in
        for site, stack in stacks.items():
            sizes[site] = float(stack[0].numel() * (len(stack) if chosen is None else chosen))
    return sizes
