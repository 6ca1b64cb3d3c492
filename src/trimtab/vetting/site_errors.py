"""How large the error is where the study measures it: at the input of the up and of the down projection.

Two errors for each site. "local": each layer is given the exact model's input, so the error is that layer's own.
"propagated": the whole model runs approximated, so errors of earlier layers are in it.

Covered: mean, standard deviation, Laplace scale, largest value, which of the two shapes fits better by likelihood, size
relative to the activation. Not covered: the down input inside stacked experts (their up input is measured).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.approximation.apply import Approximation
from trimtab.approximation.calibration import stride
from trimtab.approximation.sites import LayerSites

Key = tuple[int, str]  # layer, "up" or "down"
_Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
KEPT = 1 << 15  # values kept of each layer's site: plenty for its statistics


@dataclass(frozen=True)
class ErrorShape:
    """Errors at one site (of one layer, or pooled: ``layer`` -1).

    Attributes:
        count: values. mean, std, largest: of the error. laplace: mean distance from the median, the scale of the
            Laplace distribution that fits best. gaussian_nats, laplace_nats: mean log-likelihood of a value under the
            best fit; pooled, under its own layer's: layers differ in scale, and Gaussians mixed so look like Laplace.
        relative: std of the error over std of the exact activation.
        zeros: share of values without any error.
    """

    layer: int
    site: str
    count: int
    mean: float
    std: float
    laplace: float
    largest: float
    gaussian_nats: float
    laplace_nats: float
    relative: float
    zeros: float

    @property
    def shape(self) -> str:
        """The better fit: "Gaussian", "Laplace", or "none" where there is no error."""
        if self.std == 0.0:
            return "none"
        return "Gaussian" if self.gaussian_nats >= self.laplace_nats else "Laplace"

    def document(self) -> dict[str, Any]:
        """JSON-ready; no infinities."""
        numbers = {key: value if _finite(value) else None for key, value in asdict(self).items()}
        return {**numbers, "shape": self.shape}


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def describe(error: Tensor, exact: Tensor, layer: int, site: str) -> ErrorShape:
    """Statistics of an error against the exact activations (same shape)."""
    flat = error.reshape(-1).double()
    std, centre = float(flat.std(correction=0)), float(flat.median())
    scale = float((flat - centre).abs().mean())
    spread = float(exact.double().std(correction=0))
    gaussian = -0.5 * math.log(2 * math.pi * std * std) - 0.5 if std > 0 else math.inf
    laplace = -math.log(2 * scale) - 1.0 if scale > 0 else math.inf
    return ErrorShape(
        layer=layer,
        site=site,
        count=flat.numel(),
        mean=float(flat.mean()),
        std=std,
        laplace=scale,
        largest=float(flat.abs().max()),
        gaussian_nats=gaussian,
        laplace_nats=laplace,
        relative=std / spread if spread > 0 else math.nan,
        zeros=float((flat == 0).double().mean()),
    )


@dataclass(frozen=True)
class Recording:
    """The exact model on some rows.

    Attributes:
        ids: rows x width, no padding. inputs: (layer, site) -> exact activations. calls: the arguments of each layer.
        last: rows x layers x hidden, each layer's output at the last token.
    """

    ids: Tensor
    inputs: dict[Key, Tensor]
    hidden: dict[int, Tensor]


def record(base: Any, layers: Sequence[LayerSites], ids: Tensor) -> Recording:
    """Read unpadded rows with the exact model."""
    calls: _Calls = {}
    with _watching(layers, calls):
        inputs = _inputs(layers, lambda: base(input_ids=ids, use_cache=False, logits_to_keep=1))
    hidden = {index: (args[0] if args else kwargs["hidden_states"]) for index, (args, kwargs) in calls.items()}
    return Recording(ids, inputs, hidden)


@contextmanager
def _watching(layers: Sequence[LayerSites], calls: _Calls) -> Iterator[None]:
    """Keep the arguments of each layer's last call."""

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = (args, kwargs)

        return hook

    handles = [layer.layer.register_forward_pre_hook(keep(layer.index), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(
    base: Any, layers: Sequence[LayerSites], exact: Recording, active: Approximation
) -> dict[str, list[ErrorShape]]:
    """Errors under the approximation that is on the model: {"local": ..., "propagated": ...}, pooled entries first."""
    if not active.label:
        raise ValueError("no approximation is on the model")
    active.rows.decoded = exact.ids.shape[1] - 1  # as when they are written: what spares a prompt touches these
    try:
        return _measured(base, layers, exact)
    finally:
        active.rows.decoded = 0


def _measured(base: Any, layers: Sequence[LayerSites], exact: Recording) -> dict[str, list[ErrorShape]]:
    calls: _Calls = {}  # of the approximated pass: the attention implementation, and with it the mask, may be another
    with _watching(layers, calls):
        propagated = _inputs(layers, lambda: base(input_ids=exact.ids, use_cache=False, logits_to_keep=1))

    def one_by_one() -> None:
        for layer in layers:
            args, kwargs = calls[layer.index]
            if args:
                layer.layer(exact.hidden[layer.index], *args[1:], **kwargs)
            else:
                layer.layer(**{**kwargs, "hidden_states": exact.hidden[layer.index]})

    local = _inputs(layers, one_by_one)
    return {"local": _shapes(local, exact.inputs), "propagated": _shapes(propagated, exact.inputs)}


def _inputs(layers: Sequence[LayerSites], run: Callable[[], object]) -> dict[Key, Tensor]:
    """What reaches the up and down projections while ``run`` runs (after any approximation's own hooks)."""
    found: dict[Key, Tensor] = {}

    def keep(key: Key) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[key] = thinned((args[0] if args else kwargs["hidden_states"]).detach())

        return hook

    handles = []
    for layer in layers:
        handles.append(layer.mlp.register_forward_pre_hook(keep((layer.index, "up")), with_kwargs=True))
        if layer.down is not None:
            handles.append(layer.down.register_forward_pre_hook(keep((layer.index, "down")), with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def thinned(x: Tensor) -> Tensor:
    """Every n-th value, about ``KEPT`` of all channels; the same places for the same shape."""
    return x.reshape(-1)[:: stride(x.numel(), KEPT, x.shape[-1])].float().clone()


def _shapes(found: dict[Key, Tensor], exact: dict[Key, Tensor]) -> list[ErrorShape]:
    shapes = []
    for site in ("up", "down"):
        keys = sorted(key for key in exact if key[1] == site)
        if not keys:
            continue
        errors = [found[key] - exact[key] for key in keys]
        pooled = torch.cat([error.reshape(-1) for error in errors])
        whole = torch.cat([exact[key].reshape(-1) for key in keys])
        own = [describe(error, exact[key], key[0], site) for error, key in zip(errors, keys, strict=True)]
        shapes += [_judged_by_layer(describe(pooled, whole, -1, site), own), *own]
    return shapes


def _judged_by_layer(pooled: ErrorShape, own: Sequence[ErrorShape]) -> ErrorShape:
    kept = [one for one in own if math.isfinite(one.gaussian_nats) and math.isfinite(one.laplace_nats)]
    if not kept:
        return pooled
    gaussian, laplace = sum(one.gaussian_nats for one in kept), sum(one.laplace_nats for one in kept)
    return replace(pooled, gaussian_nats=gaussian / len(kept), laplace_nats=laplace / len(kept))
