"""Sparsity, rounding, noise and calibration as functions on tensors, against NumPy and closed forms; names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.unit.approximation.families import family, token_rows

from trimtab.approximation import naming, quantization
from trimtab.approximation.calibration import collect
from trimtab.approximation.noise import Noise, _pool, add_noise
from trimtab.approximation.sites import find_sites
from trimtab.approximation.sparsity import late_tokens, zero_below
from trimtab.approximation.technique import Rows
from trimtab.errors import UsageError


def test_symmetric_rounding_is_that_of_numpy_and_idempotent() -> None:
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    array = x.double().numpy()
    step = np.abs(array).max(-1, keepdims=True) / 7
    torch.testing.assert_close(
        quantization.round_symmetric(x.double(), 4), torch.from_numpy(np.round(array / step) * step)
    )
    once = quantization.round_symmetric(x.double(), 4)
    torch.testing.assert_close(quantization.round_symmetric(once, 4), once)
    assert len(torch.unique(torch.round(once[0, 0] / once[0, 0].abs().max() * 7))) <= 15


def test_asymmetric_rounding_keeps_the_ends_and_has_2_to_the_bits_levels() -> None:
    x = torch.rand(3, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 - 1
    rounded = quantization.round_asymmetric(x, 4)
    assert all(len(row.unique()) <= 16 for row in rounded)
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert bool(((rounded - x).abs().amax(-1) <= step * 1.0001).all())


def test_smoothing_scale_is_the_formula_and_alone_changes_nothing() -> None:
    inputs, weights = torch.tensor([4.0, 0.25, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    seen = quantization.smoothing_scale(inputs, weights, 0.5)
    assert seen.tolist() == pytest.approx([2.0, 0.25, math.sqrt(1e-5 / 2.0)], rel=1e-5)
    x = torch.randn(2, 3)
    torch.testing.assert_close(quantization.smooth(x, seen, lambda y: y), x)


def test_learnt_scales_are_no_worse_than_where_they_start() -> None:
    model = family("llama")
    layers = find_sites(model)
    calibration = collect(model, layers, token_rows(8, 16))
    for site in ("attn_in", "up"):
        x = calibration.inputs[0, site]
        weight = torch.cat(quantization.site_weights(layers[0], site))

        def loss(scale: torch.Tensor, x: torch.Tensor = x, weight: torch.Tensor = weight) -> float:
            rounded = quantization.smooth(x, scale, lambda y: quantization.round_asymmetric(y, 4))
            return float(((rounded - x) @ weight.T).square().mean())

        start = quantization.learnt_scale(layers[0], site, calibration, 4, 0)
        assert loss(quantization.learnt_scale(layers[0], site, calibration, 4, 20)) <= loss(start)


def test_teal_reaches_its_sparsity_on_held_out_tokens() -> None:
    model = family("llama")
    layers = find_sites(model)
    calibration = collect(model, layers, token_rows(40, 24))
    held_out = collect(model, layers, token_rows(40, 24, seed=5))
    for site in ("attn_in", "attn_out", "up", "down"):
        limit = calibration.quantile(0, site, 0.75)  # p = 0.5
        zeroed = float((held_out.values[0, site].abs() <= limit).float().mean())
        assert zeroed == pytest.approx(0.5, abs=0.06), site


def test_prefill_touches_the_last_tokens_of_each_row_only() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    wanted = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    assert torch.equal(late_tokens(real, 0.5), wanted)
    rows = Rows(real=real)
    x = torch.full((2, 6, 3), 0.1)
    assert torch.equal(zero_below(0.5, 0.5, rows)(x) == 0, wanted.unsqueeze(-1).expand_as(x))
    assert zero_below(0.5, 0.5, Rows(real=real[:, :1]))(x[:, :1]).count_nonzero() == 0  # decoding: every token


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_calibration_sees_real_tokens_only(name: str) -> None:
    model = family(name)
    layers = find_sites(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 5.0  # what padding is read as, far from any token
    ragged = [*token_rows(3, 5, seed=2), *token_rows(3, 20)]  # shortest first, as they are read
    together = collect(model, layers, ragged)
    apart = [collect(model, layers, [row]) for row in ragged]
    for key in together.values:
        largest = torch.stack([one.largest[key] for one in apart]).amax(0)
        torch.testing.assert_close(together.largest[key], largest, rtol=1e-4, atol=1e-6)
        values = torch.cat([one.values[key] for one in apart]).sort().values  # so few that every one is kept
        torch.testing.assert_close(together.values[key], values, rtol=1e-4, atol=1e-5)
    for key in together.inputs:
        inputs = torch.cat([one.inputs[key] for one in apart])
        assert len(inputs) == sum(map(len, ragged))
        torch.testing.assert_close(together.inputs[key], inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("site", "shape"), [("up", stats.norm), ("down", stats.laplace)])
def test_noise_has_the_shape_of_the_study(site: str, shape: stats.rv_continuous) -> None:
    pool = _pool(site, 0)[:20000].double().numpy()  # type: ignore[arg-type]
    assert stats.kstest(pool, shape.cdf).pvalue > 1e-3
    rows = Rows(positions=torch.arange(400).reshape(4, 100), ids=torch.arange(400).reshape(4, 100) % 7)
    drawn = add_noise(site, 0.3, 0, 2, rows)(torch.zeros(4, 100, 64))  # type: ignore[arg-type]
    assert float(drawn.std()) == pytest.approx(0.3 * (1 if site == "up" else math.sqrt(2)), rel=0.05)
    flat = drawn.reshape(400, 64)
    correlation = np.corrcoef(flat.numpy())[np.triu_indices(400, 1)]
    assert np.abs(correlation).mean() < 0.12  # 0.1 for independent rows of 64
    rows.draw = 1
    assert not torch.equal(add_noise(site, 0.3, 0, 2, rows)(torch.zeros(4, 100, 64)), drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["teal:0.5", "teal:share=0.5,prefill=1,split=greedy", "bolt+a8", "noise:up=0.1,down=0.2,seed=3,layers=0-3", "iron",
     "bolt:port=refit,range=8", "smoothquant:8,alpha=0.5", "omniquant:4", "kv4:layers=1-", "cats:0.3",
     "nexus:norm=yes"],
)  # fmt: skip
def test_labels_parse_to_the_same_techniques(name: str) -> None:
    found = naming.parse(name)
    again = naming.parse("+".join(technique.label for technique in found))
    assert again == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tael:0.5", "did you mean teal?"),
        ("smoothqant:8", "did you mean smoothquant?"),
        ("qwertz", "Known:"),
        ("teal", "needs share"),
        ("teal:1.5", "above 0 and below 1"),
        ("teal:half", "is a number"),
        ("teal:0.5,prefil=1", "did you mean prefill?"),
        ("teal:0.5,share=0.3", "given twice"),
        ("teal:0.5,prefill=0", "above 0 and at most 1"),
        ("teal:nan", "out of range"),
        ("smoothquant:1", "at least 2"),
        ("smoothquant:8.5", "whole number"),
        ("noise", "noise of no size"),
        ("noise:up=-1", "at least 0"),
        ("noise:up=inf", "out of range"),
        ("noise:up=1,layers=5-2", "empty range"),
        ("noise:up=1,layers=a", "FIRST-LAST"),
        ("a8+a8", "rounding twice"),
        ("smoothquant", "write, say, smoothquant:8"),
        ("a8+", "without a name"),
        ("bolt:port=gelu", "another model, not an approximation"),
        ("iron:port=refit", "nothing to refit"),
        ("bolt:range=8", "belongs to a refitted"),
        ("bolt:softmax=maybe", "use one of: yes, no"),
        ("teal:", "nothing after the colon"),
    ],
)
def test_bad_names_say_what_to_write(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        naming.parse(name)
    assert words in str(caught.value)


def test_lists_of_names() -> None:
    assert naming.split_list(["all"]) == list(naming.ALL)
    assert {name.partition(":")[0] for name in naming.split_list(["seven"])} == set(naming.SEVEN)
    assert naming.split_list(["a8; bolt", "a8"]) == ["a8", "bolt"]
    with pytest.raises(UsageError, match="no approximation"):
        naming.split_list([" "])
    assert "/" not in naming.slug("noise:up=0.1/../x")


def test_noise_covers_the_layers_asked_for() -> None:
    (noise,) = naming.parse("noise:up=0.1,layers=0-3")
    assert isinstance(noise, Noise)
    assert [layer in noise.layers for layer in (0, 3, 4)] == [True, True, False]
