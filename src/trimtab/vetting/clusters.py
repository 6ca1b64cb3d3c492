"""Do harmful prompts' activations form a cluster of their own, and does an approximation move them toward benign ones?

The study's third finding, as numbers. At a layer's output, last prompt token: the silhouette of the two groups (1: far
apart, 0: mixed), and the drift: how far an approximation moves harmful prompts along the line from the harmful to the
benign mean, as a share of that line (0: not at all, 1: onto the benign mean, negative: away from it).

Covered: bundled evaluation pairs, any approximation, an interval for the drift over prompts. Not covered: causation:
moving toward the benign mean need not be why a model complies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab import data
from trimtab.approximation.apply import approximate
from trimtab.approximation.sites import base_of, decoder_layers
from trimtab.generation import render
from trimtab.models import LoadedModel

PAIRS = 48


@dataclass(frozen=True)
class LayerDrift:
    """One layer.

    Attributes:
        silhouette, silhouette_after: of harmful against benign, exact and approximated. drift, low, high: mean over
            harmful prompts with its 95 % interval. benign_drift: the same movement of benign prompts.
        exact, after: prompts x 2 coordinates (principal plane of the exact activations); the harmful half comes first.
    """

    layer: int
    silhouette: float
    silhouette_after: float
    drift: float
    low: float
    high: float
    benign_drift: float
    exact: Tensor
    after: Tensor


@dataclass(frozen=True)
class Drift:
    """Several layers under one approximation; ``pairs`` prompts of each kind."""

    name: str
    pairs: int
    layers: tuple[LayerDrift, ...]

    def document(self) -> dict[str, Any]:
        """JSON-ready, without coordinates."""
        keys = ("layer", "silhouette", "silhouette_after", "drift", "low", "high", "benign_drift")
        rows = [{key: getattr(found, key) for key in keys} for found in self.layers]
        return {"approximation": self.name, "pairs": self.pairs, "layers": rows}


def shown_layers(loaded: LoadedModel) -> tuple[int, ...]:
    """Layer 1 as the study, the middle one and the last but one."""
    count = len(decoder_layers(base_of(loaded.model)))
    return tuple(sorted({min(1, count - 1), count // 2, max(0, count - 2)}))


def drift(loaded: LoadedModel, name: str, *, layers: tuple[int, ...], pairs: int = PAIRS) -> Drift:
    """Measure silhouettes and drift on bundled evaluation pairs."""
    chosen = data.interleaved(data.requests("eval"))[:pairs]
    prompts = [*(pair.harmful for pair in chosen), *(pair.benign for pair in chosen)]
    exact = last_token_outputs(loaded, prompts, layers)
    with approximate(loaded, name):
        after = last_token_outputs(loaded, prompts, layers)
    return Drift(name, len(chosen), tuple(layer_drift(layer, exact[layer], after[layer]) for layer in layers))


def layer_drift(layer: int, exact: Tensor, after: Tensor) -> LayerDrift:
    """Numbers and plane coordinates of one layer.

    Args:
        exact, after: prompts x hidden, the harmful half first.
    """
    half = len(exact) // 2
    line = exact[half:].mean(0) - exact[:half].mean(0)  # harmful mean -> benign mean
    moved = (after - exact) @ line / line.square().sum().clamp_min(1e-30)
    spread = 1.96 * float(moved[:half].std()) / math.sqrt(half) if half > 1 else math.inf
    mean = float(moved[:half].mean())
    centre = exact.mean(0)
    _, _, directions = torch.linalg.svd(exact - centre, full_matrices=False)
    plane = directions[:2].T
    return LayerDrift(
        layer=layer,
        silhouette=silhouette(exact),
        silhouette_after=silhouette(after),
        drift=mean,
        low=mean - spread,
        high=mean + spread,
        benign_drift=float(moved[half:].mean()),
        exact=(exact - centre) @ plane,
        after=(after - centre) @ plane,
    )


def silhouette(points: Tensor) -> float:
    """Mean silhouette (Rousseeuw 1987) of two equal groups, first half and second half, Euclidean distance."""
    half = len(points) // 2
    if half < 2:
        return math.nan
    gaps = torch.cdist(points.double(), points.double())
    first = torch.arange(len(points)) < half
    own = torch.where(first, gaps[:, :half].sum(1), gaps[:, half:].sum(1)) / (half - 1)
    other = torch.where(first, gaps[:, half:].mean(1), gaps[:, :half].mean(1))
    return float(((other - own) / torch.maximum(own, other).clamp_min(1e-30)).mean())


def last_token_outputs(loaded: LoadedModel, prompts: list[str], layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Layer -> prompts x hidden: each layer's output at the last token of the rendered prompt (the token before the
    answer), float32."""
    base = base_of(loaded.model)
    stack = decoder_layers(base)
    rows = [render(loaded, [{"role": "user", "content": text}]) for text in prompts]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer].append(hidden[:, -1].detach().float().cpu())

        return hook

    handles = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), 16):
                ids, mask = _left_padded(rows[start : start + 16])
                base(
                    input_ids=ids.to(base.device),
                    attention_mask=mask.to(base.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts).clone() for layer, parts in found.items()}


def _left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return ids, mask
