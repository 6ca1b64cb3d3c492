"""Quantised activations, weights in full precision: per token, SmoothQuant, OmniQuant's learnt scales, the KV cache.

Values are rounded and scaled back ("fake quantisation"): what is measured is the rounding, not a kernel. Smoothing is
applied to the input alone: rounding x / s and multiplying by s again equals rounding the smoothed model's input, since
the weights stay exact; so no weight is touched. Scale and steps are computed in float32 whatever the model's type, and
the result is cast back: in bfloat16 itself a level among 256 would be missed by one or two.

Covered: symmetric per token (A8 ... A3) on two grids; SmoothQuant (ICML 2023) on the inputs of attention and of the up
projection, the other inputs unsmoothed, as its code does; OmniQuant's learnable equivalent transformation (ICLR 2024),
asymmetric per token, query, key and value too; keys and values of the cache, asymmetric for each token and head.
Scales are made from a quantised checkpoint's weights as numbers (``weights.py``).
Not covered: weight quantisation (name a quantised checkpoint as the model), static scales, OmniQuant's query-key and
value-output smoothing, which its code cannot do under grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.approximation.calibration import Calibration
from trimtab.approximation.entries import ALL_LAYERS, LAYERS, Entry, LayerRange, Named, Parameter
from trimtab.approximation.experts import check_experts
from trimtab.approximation.ranges import widened
from trimtab.approximation.sites import INPUT_SITES, LayerSites, Site
from trimtab.approximation.technique import Edit, Subject
from trimtab.approximation.weights import dense_weight

LEAST = 1e-5
FITTING_STEPS, FITTING_RATE, FITTING_TOKENS = 20, 5e-3, 256
_SMOOTHED: tuple[Site, ...] = ("attn_in", "up")
_CACHED: tuple[Site, ...] = ("key", "value")
_SILENT = {"grid": "even"}


def round_symmetric(x: Tensor, bits: int, grid: str = "even") -> Tensor:
    """Each token (last dimension) to multiples of a share of its largest magnitude M.

    Args:
        x: ... x channels.
        bits: of each value.
        grid: "even": 2^(bits-1) - 1 steps either side of zero, M the last one, as the code of SmoothQuant. "full":
            one step more below zero, M half a step beyond the last one above and clipped, as compressed-tensors
            (llm-compressor, vLLM) and torchao: the same values to the bit as the former.
    """
    top = 2 ** (bits - 1) - 1
    span = top if grid == "even" else top + 0.5
    wide = widened(x)
    step = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST) / span
    levels = torch.round(wide / step)
    if grid != "even":
        levels = levels.clamp(-top - 1, top)
    rounded: Tensor = levels * step
    return rounded.to(x.dtype)


def round_asymmetric(x: Tensor, bits: int, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Each token (last dimension) to 2^bits levels between its smallest and its largest value.

    ``rounding`` takes values in steps to whole numbers; ``round_through`` does so with a derivative.
    """
    wide = widened(x)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    step = (high - low).clamp_min(LEAST) / (2**bits - 1)
    zero = torch.round(-low / step)
    rounded: Tensor = ((rounding(wide / step) + zero).clamp(0, 2**bits - 1) - zero) * step
    return rounded.to(x.dtype)


def round_through(x: Tensor) -> Tensor:
    """To the nearest whole number; the derivative is that of x (straight through, Bengio et al. 2013)."""
    return x + (torch.round(x) - x).detach()


def smooth(x: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Round x as a smoothed model would: divided by ``scale`` (channels), and back."""
    wide = widened(x)
    scale = scale.to(wide)
    return (rounding(wide / scale) * scale).to(x.dtype)


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), both maxima and s held above 1e-5.

    Args:
        inputs: largest magnitude of each channel. weights: the same over all rows of the maps that read them.
    """
    return (inputs.clamp_min(LEAST) ** alpha / weights.clamp_min(LEAST) ** (1.0 - alpha)).clamp_min(LEAST)


def weight_maxima(layer: LayerSites, site: Site) -> Tensor:
    """Largest magnitude in each input channel over the site's linear maps."""
    return torch.stack([weight.abs().amax(0).float() for weight in site_weights(layer, site)]).amax(0)


def site_weights(layer: LayerSites, site: Site) -> list[Tensor]:
    """Weights (out x in) that read a site; experts' are stacked into one.

    Raises:
        ApproximationError: weights that cannot be read as numbers.
    """
    if layer.experts and site == "up":
        check_experts(layer.mlp)
        stacked: Tensor = layer.mlp.gate_up_proj.detach()  # type: ignore[operator]
        return [stacked.reshape(-1, stacked.shape[-1])]
    return [dense_weight(module) for module in {"attn_in": layer.attention_in, "up": layer.up}[site]]


@dataclass(frozen=True)
class Rounded(Named):
    """Every linear map's input, symmetric per token."""

    bits: int
    grid: str = "even"
    layers: LayerRange = ALL_LAYERS

    head = "a{bits}"
    silent = _SILENT
    kind, sites = "rounding", INPUT_SITES

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return [f"A{self.bits}: inputs of all linear maps, per token, symmetric, {self.grid} grid, weights exact (W16)"]

    def edits(self, subject: Subject) -> list[Edit]:
        return [
            Edit(layer.index, site, _symmetric(self.bits, self.grid))
            for layer in subject.layers
            if layer.index in self.layers
            for site in INPUT_SITES
        ]


@dataclass(frozen=True)
class SmoothQuant(Named):
    """Symmetric per token behind SmoothQuant's scales."""

    bits: int
    alpha: float = 0.85
    grid: str = "even"
    layers: LayerRange = ALL_LAYERS

    head = "smoothquant"
    silent = _SILENT
    kind, sites = "rounding", INPUT_SITES

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        what = f"SmoothQuant W16A{self.bits}, alpha {self.alpha:g}, {self.grid} grid"
        return [f"{what}; inputs of output and down projections unsmoothed"]

    def edits(self, subject: Subject) -> list[Edit]:
        calibration = subject.calibration()
        found = []
        for layer in subject.layers:
            if layer.index not in self.layers:
                continue
            for site in INPUT_SITES:
                function = _symmetric(self.bits, self.grid)
                if site in _SMOOTHED:
                    largest = calibration.largest[layer.index, site]
                    scale = smoothing_scale(largest, weight_maxima(layer, site), self.alpha)
                    function = _smoothed(scale, function)
                found.append(Edit(layer.index, site, function))
        return found


@dataclass(frozen=True)
class OmniQuant(Named):
    """Asymmetric per token behind learnt scales; query, key and value rounded too."""

    bits: int
    steps: int = FITTING_STEPS
    layers: LayerRange = ALL_LAYERS

    head = "omniquant"
    kind, sites = "rounding", (*INPUT_SITES, "query", *_CACHED)

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return [
            f"OmniQuant-style W16A{self.bits}: scales of attention's and up's inputs learnt in {self.steps} steps on "
            "the output of their maps; no query-key or value-output smoothing"
        ]

    def edits(self, subject: Subject) -> list[Edit]:
        calibration = subject.calibration()
        found = []
        for layer in subject.layers:
            if layer.index not in self.layers:
                continue
            for site in INPUT_SITES:
                function = _asymmetric(self.bits)
                if site in _SMOOTHED:
                    function = _smoothed(learnt_scale(layer, site, calibration, self.bits, self.steps), function)
                found.append(Edit(layer.index, site, function))
            found += [Edit(layer.index, site, _asymmetric(self.bits)) for site in self.sites if site not in INPUT_SITES]
        return found


@dataclass(frozen=True)
class RoundedCache(Named):
    """Keys and values as attention reads them."""

    bits: int
    layers: LayerRange = ALL_LAYERS

    head = "kv{bits}"
    kind, sites = "rounding", _CACHED

    def notes(self, subject: Subject) -> list[str]:  # noqa: ARG002
        return [f"KV cache at {self.bits} bits, for each token and head, asymmetric; no recent tokens kept exact"]

    def edits(self, subject: Subject) -> list[Edit]:
        return [
            Edit(layer.index, site, _asymmetric(self.bits))
            for layer in subject.layers
            if layer.index in self.layers
            for site in self.sites
        ]


def learnt_scale(layer: LayerSites, site: Site, calibration: Calibration, bits: int, steps: int) -> Tensor:
    """Scale (channels) that minimises the squared error of the site's maps' outputs, from SmoothQuant's at alpha 0.5.

    The derivative passes straight through the rounding alone, so it follows how a scale changes a token's step; AdamW
    without decay; both as OmniQuant. The source fits a whole block's output; a site's maps are linear and next to it,
    so we fit theirs. The best scale seen is kept, so it is never worse than the start.
    """
    with torch.inference_mode(False):  # where the caller has it on, nothing could be fitted
        return _fitted(layer, site, calibration, bits, steps)


def _fitted(layer: LayerSites, site: Site, calibration: Calibration, bits: int, steps: int) -> Tensor:
    x = calibration.inputs[layer.index, site][:FITTING_TOKENS].clone()
    stacked = torch.cat([weight.float() for weight in site_weights(layer, site)])
    stride = max(1, len(stacked) // 512)  # a spread of output rows is enough to fit as many scales
    weight = stacked[::stride]
    start = smoothing_scale(calibration.largest[layer.index, site].clone(), weight_maxima(layer, site), 0.5)
    target = x @ weight.T
    logs = start.log().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([logs], lr=FITTING_RATE, weight_decay=0.0)
    best, least = start, float("inf")
    with torch.enable_grad():
        for _ in range(steps + 1):
            rounded = round_asymmetric(x / logs.exp(), bits, round_through)
            loss = ((rounded * logs.exp()) @ weight.T - target).square().mean()
            if loss.item() < least:
                best, least = logs.detach().exp().clone(), loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return best


def _symmetric(bits: int, grid: str) -> Callable[[Tensor], Tensor]:
    return lambda x: round_symmetric(x, bits, grid)


def _asymmetric(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda x: round_asymmetric(x, bits)


def _smoothed(scale: Tensor, rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: smooth(x, scale, rounding)


_BITS = Parameter(kind=int, low=2, high=16, required=True, example="8")
_GRID = Parameter(kind=str, default="even", choices=("even", "full"))
ENTRIES = {
    **{f"a{bits}": Entry(Rounded, {"grid": _GRID, "layers": LAYERS}, {"bits": bits}) for bits in (8, 6, 5, 4, 3)},
    "smoothquant": Entry(
        SmoothQuant,
        {
            "bits": _BITS,
            "alpha": Parameter(kind=float, default=0.85, low=0.0, high=1.0),
            "grid": _GRID,
            "layers": LAYERS,
        },
    ),
    "omniquant": Entry(
        OmniQuant,
        {"bits": _BITS, "steps": Parameter(kind=int, default=FITTING_STEPS, low=0, high=1000), "layers": LAYERS},
    ),
    **{f"kv{bits}": Entry(RoundedCache, {"layers": LAYERS}, {"bits": bits}) for bits in (8, 4, 3, 2)},
}
