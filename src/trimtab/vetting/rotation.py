"""The same model in other coordinates, whose activations have no outliers: nothing to repair, less to round away.

A decoder with RMSNorm does not care in which orthonormal basis its residual stream is written, once the norms' gains
are moved into the maps behind them: RMSNorm(x R) = RMSNorm(x) R. Between value and output projection, any basis of a
head will do. And the channels that the feed-forward block multiplies may each be made smaller in the up projection and
larger in the down projection. A basis that mixes all channels (a Hadamard matrix) spreads the few giant ones, so that a
token's largest value, which sets the step of its rounding, is a small multiple of its typical one. The exact model is
the same function; only approximations see another one.

Residual stream and value heads: QuaRot (Ashkboos et al., 2024, sections 4.1 and 4.2, without its online rotations) and
SliceGPT (2024) before it. The scales of the down projection's input: SmoothQuant's transformation, chosen by what
rounding to 4 bits does to the product.

Covered: dense decoders with two RMSNorms a layer and one at the end, separate or fused projections, tied embeddings
(which are untied: a second matrix of vocabulary x hidden size), biases. Not covered: experts, norms after a block
(Gemma 2 and 3), LayerNorm, quantised weights, adapters (merge first): those raise. Whatever else does not commute is
found by comparing logits, and raises too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from trimtab.approximation.quantization import round_symmetric
from trimtab.approximation.sites import LayerSites, find_sites, watch
from trimtab.errors import ModelError

# Largest change of a logit, of the largest logit: float32 leaves 1e-6 to 3e-5; half precision rounds every weight anew.
TOLERANCE, OF_HALF = 1e-3, 16  # the latter in steps of the type at one
BITS = 4  # of the rounding by which scales are chosen
POWERS = [(size, against) for size in (0.5, 0.7, 0.85, 1.0) for against in (0.0, 0.3, 0.6)]
TOKENS = 768  # on which a layer's scales are chosen, at most
LEAST = 1e-5
AS_IT_IS = "harden the model as it is, with --method distill"


class Rotated(NamedTuple):
    """What was done. ``gap``: largest change of a logit, as a share of the largest; ``untied``: whether the output
    layer had the embedding's weights; ``errors``: mean error of the down projections under 4 bits, of their output's
    length, before and after the scales (layers x 2)."""

    gap: float
    untied: bool
    errors: list[tuple[float, float]]


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size x size, float64) whose entries are all about as large.

    The Kronecker product of a random orthogonal matrix of the size's odd factor and a Hadamard matrix of the other, its
    rows with random signs.
    """
    power = size & -size
    random = np.random.default_rng(seed)
    mixed = hadamard(power) / np.sqrt(power)
    if size > power:
        mixed = np.kron(np.linalg.qr(random.standard_normal((size // power,) * 2))[0], mixed)
    signs = random.choice([-1.0, 1.0], size)
    return torch.tensor(signs[:, None] * mixed, dtype=torch.float64)


@torch.no_grad()
def rotate(model: Any, ids: Sequence[Sequence[int]], seed: int = 0) -> Rotated:
    """Change a model's weights so that it computes the same in other coordinates.

    Args:
        model: a causal language model, changed in place; in float32 it stays the same to about 1e-5 of a logit, in
            bfloat16 every weight is rounded anew.
        ids: rows of token ids; scales are chosen on their activations and logits compared on them.
        seed: of the bases.

    Raises:
        ModelError: for a model that this cannot be done to, or where the logits changed.
    """
    layers = find_sites(model)
    norms = _norms(model, layers)
    before = _logits(model, ids)
    untied = _untie(model)
    hidden = model.get_input_embeddings().weight.shape[1]
    embedding = model.get_input_embeddings().weight
    basis = orthogonal(hidden, seed).to(embedding.device)
    _turn_inputs(basis, norms.last, [model.get_output_embeddings()])
    embedding.copy_(embedding.double() @ basis)
    for layer in layers:
        _turn_inputs(basis, norms.attention[layer.index], layer.attention_in)
        _turn_inputs(basis, norms.mlp[layer.index], layer.up)
        _turn_values(layer, model.config.get_text_config(), seed + 1 + layer.index)
        for module in (layer.attention_out, layer.down):
            _turn_output(basis, module)
    errors = _scale_down(model, layers, ids)
    tolerance = max(TOLERANCE, OF_HALF * torch.finfo(embedding.dtype).eps)
    gap = _compare(before, _logits(model, ids), tolerance)
    return Rotated(gap, untied, errors)


class _Norms(NamedTuple):
    """By layer, the norm whose output each block reads; and the one before the output layer."""

    attention: list[nn.Module]
    mlp: list[nn.Module]
    last: nn.Module


def _norms(model: Any, layers: Sequence[LayerSites]) -> _Norms:
    head = model.get_output_embeddings()
    calls = watch(model, [model])
    found = [module for module in calls if _has_gain_only(module)]
    by_output = {left.data_ptr(): norm for norm in found if (left := calls[norm].left) is not None}

    def before(module: nn.Module, what: str) -> nn.Module:
        entered = calls[module].entered if module in calls else None
        norm = by_output.get(entered.data_ptr()) if entered is not None else None
        if norm is None:
            raise _refused(f"no norm right before {what}", model)
        return norm

    for layer in layers:
        if layer.experts:
            raise _refused("experts", model)
        for module in (*layer.attention_in, layer.attention_out, *layer.up, layer.down):
            if type(module) is not nn.Linear or not module.weight.is_floating_point():
                raise _refused(f"{type(module).__name__} in the place of a plain linear map", model)
    norms = _Norms(
        [before(layer.attention_in[0], "attention") for layer in layers],
        [before(layer.up[0], "the feed-forward block") for layer in layers],
        before(head, "the output layer"),
    )
    used = {*norms.attention, *norms.mlp, norms.last}
    within = {module for layer in layers for module in layer.layer.modules()}
    spare = [norm for layer in layers for norm in layer.norms if norm not in used]
    if spare or len(used) != 2 * len(layers) + 1 or norms.last in within:
        raise _refused("norms after a block, or one for two blocks", model)
    return norms


def _has_gain_only(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return not list(module.children()) and len(weights) == 1 and weights[0].dim() == 1


def _refused(why: str, model: Any) -> ModelError:
    return ModelError("this model cannot be rotated", seen=f"{type(model).__name__}: {why}", fix=AS_IT_IS)


def _untie(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True


def _turn_inputs(basis: Tensor, norm: Any, maps: Sequence[Any]) -> None:
    """W diag(g) R in the place of W, and a gain of one in the norm's."""
    gain = _gain(norm)
    for module in maps:
        module.weight.copy_((module.weight.double() * gain) @ basis)
    for neutral in (1.0, 0.0):  # Gemma's gain is one plus its weight
        norm.weight.fill_(neutral)
        if torch.allclose(_gain(norm), torch.ones_like(gain), atol=1e-3):
            return
    raise ModelError("a norm's gain cannot be set to one", seen=type(norm).__name__)


def _gain(norm: Any) -> Tensor:
    """What the norm makes of ones, whose root mean square is one: its gain, float64."""
    weight: Tensor = norm.weight
    gain: Tensor = norm(torch.ones_like(weight)[None])[0].double()
    return gain


def _turn_values(layer: Any, config: Any, seed: int) -> None:
    """Rotate each value head's output, and back in the output projection's input; every query head of a group alike.

    A fused projection holds queries, keys and values in this order; of separate ones values come last.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    read, out = layer.attention_in[-1], layer.attention_out.weight
    width = out.shape[1] // heads
    basis = orthogonal(width, seed).to(out.device)
    values = read.weight[-groups * width :]
    values.copy_(torch.einsum("de,gdx->gex", basis, values.double().view(groups, width, -1)).reshape(values.shape))
    if read.bias is not None:
        bias = read.bias[-groups * width :]
        bias.copy_((bias.double().view(groups, width) @ basis).reshape(-1))
    out.copy_((out.double().view(-1, heads, width) @ basis).reshape(out.shape))


def _turn_output(basis: Tensor, module: Any) -> None:
    module.weight.copy_(basis.T @ module.weight.double())
    if module.bias is not None:
        module.bias.copy_(module.bias.double() @ basis)


def _scale_down(model: Any, layers: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    inputs: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    handles = [
        layer.down.register_forward_pre_hook(
            lambda _, args, index=layer.index: inputs[index].append(args[0].detach().flatten(0, -2).float())
        )
        for layer in layers
    ]
    try:
        _logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    errors = []
    for layer in layers:
        seen, down = _some(torch.cat(inputs[layer.index])), layer.down
        scale, before, after = best_scale(seen, down.weight.float())
        up = layer.up[-1]  # gate and up, or one map with the gate's rows first
        for part in (up.weight, up.bias):
            if part is not None:
                rows = part[-len(scale) :]
                rows.copy_((rows.double().T / scale.double()).T)
        down.weight.copy_(down.weight.double() * scale.double())
        errors.append((before, after))
    return errors


def _some(tokens: Tensor) -> Tensor:
    """At most ``TOKENS`` of them, evenly spaced."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(TOKENS, len(tokens)), device=tokens.device).long()]


def best_scale(inputs: Tensor, weight: Tensor) -> tuple[Tensor, float, float]:
    """Scales s for which rounding x / s to 4 bits a token disturbs (x / s) (W diag(s))^T least.

    Tried are powers of each channel's root mean square or 99th percentile over powers of the length of its column in W.

    Args:
        inputs: tokens x channels. weight: out x channels.

    Returns:
        s (channels; all ones where nothing is better), and the mean over tokens of the squared error over the squared
        length of the output, at ones and at s.
    """
    exact = inputs @ weight.T
    length = exact.square().sum(-1).clamp_min(1e-9)

    def error(scale: Tensor) -> float:
        rounded = round_symmetric(inputs / scale, BITS) * scale
        return float(((rounded @ weight.T - exact).square().sum(-1) / length).mean())

    ones = torch.ones(inputs.shape[1], device=inputs.device)
    first = error(ones)
    best = (first, ones)
    columns = weight.norm(dim=0).clamp_min(LEAST)
    for size in (inputs.square().mean(0).sqrt(), inputs.abs().quantile(0.99, dim=0)):
        for power, against in POWERS:
            scale = size.clamp_min(LEAST) ** power / columns**against
            scale = scale / scale.log().mean().exp()
            best = min(best, (error(scale), scale), key=lambda one: one[0])
    return best[1], first, best[0]


def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    device = next(model.parameters()).device
    rows = [torch.tensor([list(row)], device=device) for row in ids]
    return [model(input_ids=row, use_cache=False).logits.float().cpu() for row in rows]


def _compare(before: list[Tensor], after: list[Tensor], tolerance: float) -> float:
    largest = max(float(one.abs().max()) for one in before)
    gap = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True)) / largest
    if not gap <= tolerance:
        seen = f"logits changed by {gap:.2g} of the largest"
        raise ModelError(
            "this model is not the same after rotating",
            seen=seen,
            fix="harden the model as it is, with --method distill",
        )
    return gap
