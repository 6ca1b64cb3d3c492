"""SmoothQuant against a model that is really smoothed; learnt scales against plain rounding with outlier channels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor, nn

from trimtab import approximate
from trimtab.approximation import quantization
from trimtab.approximation.calibration import Calibration, collect
from trimtab.approximation.sites import Site, find_sites

IDS = torch.tensor(token_rows(4, 14))
CALIBRATION = token_rows(8, 16, seed=1)
ALPHA = 0.85
BLOCKS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def outliers(model: Any, factor: float = 30.0) -> Any:
    """Two channels of every norm far above the others, as in trained models."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in BLOCKS:
                layer.get_submodule(name).weight[3] *= factor
                layer.get_submodule(name).weight[17] *= factor / 2
    return model


def rounded(x: Tensor, bits: int) -> Tensor:
    """Per token, symmetric: by NumPy."""
    values = x.detach().numpy()
    step = np.abs(values).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return torch.from_numpy(np.round(values / step) * step)


def smoothed(model: Any, bits: int) -> Any:
    """Norms divided by s, the maps that read them multiplied; then every map's input rounded."""
    model = copy.deepcopy(model)
    seen: dict[nn.Module, list[Tensor]] = {}
    norms = [layer.get_submodule(name) for layer in model.model.layers for name in BLOCKS]
    handles = [
        norm.register_forward_hook(lambda module, args, output: seen.setdefault(module, []).append(output))
        for norm in norms
    ]
    with torch.no_grad():
        for row in CALIBRATION:
            model(input_ids=torch.tensor([row]))
        for handle in handles:
            handle.remove()
        for layer in model.model.layers:
            for name, readers in BLOCKS.items():
                maps = [layer.get_submodule(reader) for reader in readers]
                largest = torch.cat(seen[layer.get_submodule(name)], 1).abs().amax((0, 1))
                weights = torch.cat([one.weight for one in maps]).abs().amax(0)
                s = largest**ALPHA / weights ** (1 - ALPHA)
                layer.get_submodule(name).weight /= s
                for one in maps:
                    one.weight *= s
            for one in layer.modules():
                if isinstance(one, nn.Linear):
                    one.register_forward_pre_hook(lambda _, args: rounded(args[0], bits))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_those_of_a_really_smoothed_model(bits: int) -> None:
    """In double precision, so that hardly a value lies between two levels within an error of arithmetic."""
    model = outliers(family("llama")).double()
    with torch.no_grad():
        exact, wanted = model(input_ids=IDS).logits, smoothed(model, bits)(input_ids=IDS).logits
        with approximate(model, f"smoothquant:{bits},alpha={ALPHA}", calibration_rows=CALIBRATION):
            seen = model(input_ids=IDS).logits
        with approximate(model, f"a{bits}"):
            unsmoothed = model(input_ids=IDS).logits
    moved = float((wanted - exact).abs().max())
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-4 * moved)
    assert float((seen - unsmoothed).abs().max()) > 0.1 * moved  # the scales do something


def output_error(layer: Any, site: Site, x: Tensor, scale: Tensor, bits: int) -> float:
    """Mean squared error of the site's maps' outputs, rounded behind a scale."""
    weight = torch.cat(quantization.site_weights(layer, site))
    moved = quantization.smooth(x, scale, lambda y: quantization.round_asymmetric(y, bits)) - x
    return float((moved @ weight.T).square().mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("site", ["attn_in", "up"])
def test_learnt_scales_strictly_improve_where_channels_stand_out(site: Site, bits: int) -> None:
    """Upon plain rounding several times over, and upon their start by 1 to 20 %; on other rows too."""
    model = outliers(family("llama"))
    layers = find_sites(model)
    calibration, held_out = (collect(model, layers, token_rows(24, 16, seed=seed)) for seed in (1, 2))
    for layer in layers:
        key = (layer.index, site)
        largest = calibration.largest[key]
        assert float(largest.max() / largest.median()) > 8.0
        start = quantization.learnt_scale(layer, site, calibration, bits, 0)
        learnt = quantization.learnt_scale(layer, site, calibration, bits, 20)
        fitted = calibration.inputs[key][: quantization.FITTING_TOKENS]
        plain, before, after = (
            output_error(layer, site, fitted, scale, bits) for scale in (torch.ones_like(start), start, learnt)
        )
        assert after < 0.3 * plain, (plain, after)
        assert after < 0.99 * before, (before, after)
        plain, before, after = (
            output_error(layer, site, held_out.inputs[key], scale, bits)
            for scale in (torch.ones_like(start), start, learnt)
        )
        assert after < 0.3 * plain and after < 0.99 * before, (plain, before, after)


def test_the_start_is_smoothquant_s_scale_at_one_half() -> None:
    model = outliers(family("llama"))
    layers = find_sites(model)
    calibration: Calibration = collect(model, layers, CALIBRATION)
    largest, weights = calibration.largest[0, "up"], quantization.weight_maxima(layers[0], "up")
    start = quantization.learnt_scale(layers[0], "up", calibration, 4, 0)
    torch.testing.assert_close(start, (largest / weights).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_model_with_learnt_scales_is_nearer_to_the_exact_one(bits: int) -> None:
    model = outliers(family("llama"), factor=60.0)
    ids = torch.tensor(token_rows(24, 16, seed=2))
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        gaps = {}
        for name in (f"omniquant:{bits}", f"a{bits}+kv{min(bits, 8)}"):
            with approximate(model, name, calibration_rows=CALIBRATION):
                gaps[name] = float((model(input_ids=ids).logits - exact).norm())
    smoothed_gap, plain_gap = gaps.values()
    assert smoothed_gap < 0.8 * plain_gap, gaps
