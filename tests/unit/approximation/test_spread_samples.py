"""Samples that a measurement rests on: every channel, every category of requests, evaluation mode, any device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.tiny import tiny_model

from trimtab import data
from trimtab.approximation.apply import approximate
from trimtab.approximation.calibration import collect, stride
from trimtab.approximation.sites import find_sites
from trimtab.approximation.sparsity import zero_below
from trimtab.approximation.technique import Rows
from trimtab.vetting import site_errors

ROWS = tuple(tuple(range(4, 12 + length)) for length in range(6))


@pytest.mark.parametrize("width", [24, 576, 1536, 1537])
@pytest.mark.parametrize("tokens", [7, 600, 5000])
def test_a_thinned_sample_has_every_channel(width: int, tokens: int) -> None:
    values, kept = tokens * width, 1 << 15
    step = stride(values, kept, width)
    channels = Counter(int(place) % width for place in torch.arange(0, values, step))
    assert values <= kept or values // step >= kept, "no fewer than asked for"
    if values // step >= 2 * width:
        assert len(channels) == width and max(channels.values()) - min(channels.values()) <= 1


def test_errors_at_the_down_site_are_of_every_channel() -> None:
    x = torch.arange(1536.0).expand(1, 900, 1536)
    assert len(site_errors.thinned(x).unique()) == 1536


def test_any_first_part_of_interleaved_requests_is_spread_over_the_categories() -> None:
    pairs = data.requests("eval")
    categories = {pair.category for pair in pairs}
    mixed = data.interleaved(pairs)
    assert sorted(map(tuple, mixed)) == sorted(map(tuple, pairs))
    for count in (14, 16, 24, 48):
        seen = Counter(pair.category for pair in mixed[:count])
        assert set(seen) == categories and max(seen.values()) - min(seen.values()) <= 1


def test_calibration_sees_the_model_without_dropout() -> None:
    model = tiny_model().model
    layers = find_sites(model)
    model.eval()
    calm = collect(model, layers, ROWS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    found = collect(model, layers, ROWS)
    assert model.training, "the mode is the caller's afterwards"
    assert all(torch.equal(found.values[key], calm.values[key]) for key in calm.values)


def test_sparsity_of_a_prompt_works_where_the_layer_is_on_another_device_than_the_mask() -> None:
    rows = Rows(real=torch.ones(2, 6, dtype=torch.bool))
    cut = zero_below(0.5, 0.5, rows)
    assert cut(torch.zeros(2, 6, 8, device="meta")).device.type == "meta"


def test_scales_are_fitted_in_inference_mode_too() -> None:
    loaded = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    with approximate(loaded, "omniquant:4", calibration_rows=ROWS), torch.no_grad():
        expected = loaded.model(input_ids=ids).logits
    with torch.inference_mode(), approximate(loaded, "omniquant:4", calibration_rows=ROWS):
        assert torch.equal(loaded.model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["teal:0.5", "teal:0.5,prefill=1"])
def test_errors_are_those_of_written_tokens_whatever_a_prompt_is_spared(name: str) -> None:
    loaded = tiny_model()
    layers, ids = find_sites(loaded.model), torch.arange(4, 24)[None]
    exact = site_errors.record(loaded.model, layers, ids)
    with approximate(loaded, name, calibration_rows=ROWS) as active:
        found = site_errors.measure(loaded.model, layers, exact, active)
        assert active.rows.decoded == 0
    pooled = next(one for one in found["local"] if one.site == "down" and one.layer == -1)
    assert pooled.zeros <= 1 / 20, "the first token alone may be spared; half of the row was, once"


def test_pooled_errors_have_the_shape_of_their_layers() -> None:
    """Normal errors of very different size in two layers: pooled, they would look like a Laplace distribution."""
    draw = torch.Generator().manual_seed(0)
    exact = {(layer, "up"): torch.randn(20_000, generator=draw) for layer in range(2)}
    errors = {(0, "up"): 0.01, (1, "up"): 1.0}
    found = {key: exact[key] + size * torch.randn(20_000, generator=draw) for key, size in errors.items()}
    pooled, *own = site_errors._shapes(found, exact)
    assert [one.shape for one in own] == ["Gaussian", "Gaussian"] and pooled.shape == "Gaussian"
    mixed = site_errors.describe(torch.cat([found[key] - exact[key] for key in exact]), torch.ones(2), -1, "up")
    assert mixed.shape == "Laplace" and pooled.std == pytest.approx(mixed.std)
