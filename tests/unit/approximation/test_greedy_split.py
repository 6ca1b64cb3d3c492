"""TEAL's greedy split: the steps against a closed form, the errors on models against the same share everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from tests.unit.approximation.families import family, token_rows
from torch import Tensor, nn

from trimtab import approximate
from trimtab.approximation import greedy
from trimtab.approximation.calibration import collect
from trimtab.approximation.greedy import Shares, allocate, greedy_shares, site_sizes
from trimtab.approximation.sites import Site, find_sites
from trimtab.approximation.technique import Rows, Subject

CALIBRATION = token_rows(24, 24, seed=1)
HELD_OUT = torch.tensor(token_rows(24, 24, seed=2))
SIZES: dict[Site, float] = {"attn_in": 4.0, "attn_out": 1.0, "up": 10.0, "down": 5.0}
WEIGHTS: dict[Site, float] = {"attn_in": 4.0, "attn_out": 2.0, "up": 16.0, "down": 4.0}


def mean(shares: Shares, sizes: dict[Site, float]) -> float:
    return sum(shares[site] * size for site, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("share", [0.1, 0.333, 0.5])
def test_the_steps_reach_the_least_error_for_what_is_saved(share: float) -> None:
    """Squared errors w p^2 under sum(size p) = const: by Lagrange's rule p is proportional to size / w."""
    shares = allocate(SIZES, share, lambda at: math.sqrt(sum(WEIGHTS[site] * at[site] ** 2 for site in at)))
    assert mean(shares, SIZES) == pytest.approx(share, abs=1e-9)
    ratio = {site: SIZES[site] / WEIGHTS[site] for site in SIZES}
    scale = share * sum(SIZES.values()) / sum(SIZES[site] * ratio[site] for site in SIZES)
    for site, size in SIZES.items():
        step = sum(SIZES.values()) / 50 / size  # what a step adds to this site's share
        assert shares[site] == pytest.approx(scale * ratio[site], abs=1.01 * step), site


def test_a_step_is_judged_by_what_it_saves() -> None:
    """Equal errors for equal shares: the large site saves more for the same error."""
    shares = allocate({"up": 9.0, "down": 1.0}, 0.3, lambda at: at["up"] + at["down"])
    assert shares["down"] == 0.0 and shares["up"] == pytest.approx(0.3 / 0.9)


def test_no_site_is_emptied_and_more_than_the_limit_can_be_asked_of_all() -> None:
    shares = allocate({"up": 1.0, "down": 1.0}, 0.7, lambda at: at["up"])
    assert shares == pytest.approx({"up": 0.41, "down": 0.99})
    assert allocate({"up": 1.0, "down": 3.0}, 0.995, lambda at: at["up"]) == pytest.approx({"up": 0.995, "down": 0.995})


def test_steps_that_end_worse_than_the_same_share_everywhere_are_dropped() -> None:
    """The first steps on "up" are free, the later ones ruinous; "down" costs a little throughout."""
    assert allocate({"up": 1.0, "down": 1.0}, 0.5, lambda at: at["down"] + 100 * max(0.0, at["up"] - 0.6)) == (
        pytest.approx({"up": 0.6, "down": 0.4})
    )

    def trap(at: Shares) -> float:
        return 0.0 if at["up"] == at["down"] else at["down"] + 100 * max(0.0, abs(at["up"] - at["down"]) - 0.1)

    assert allocate({"up": 1.0, "down": 1.0}, 0.5, trap) == pytest.approx({"up": 0.5, "down": 0.5})


def layer_outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Each layer's output on the later half of the rows."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        found.append(value[:, ids.shape[1] // 2 :].float().clone())

    handles = [layer.register_forward_hook(note) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def errors(model: Any, name: str, *texts: Tensor) -> list[list[float]]:
    """Of each layer's output on each of some texts, later layers on what the earlier ones gave them."""
    exact = [layer_outputs(model, ids) for ids in texts]
    with approximate(model, name, calibration_rows=CALIBRATION):
        seen = [layer_outputs(model, ids) for ids in texts]
    return [
        [float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]
        for found, wanted in zip(seen, exact, strict=True)
    ]


@pytest.mark.parametrize(("name", "threshold"), [
    ("llama", "histogram"), ("llama", "magnitude"), ("gemma2", "histogram"), ("phi3", "histogram"),
    ("mixtral", "histogram"),
])  # fmt: skip
def test_outputs_err_less_than_with_the_same_share_everywhere(name: str, threshold: str) -> None:
    model = family(name)
    own = torch.tensor(CALIBRATION[:11])  # what the split is measured on, 256 tokens
    greedy, even = (
        errors(model, f"teal:0.5,prefill=1,threshold={threshold},split={split}", own, HELD_OUT)
        for split in ("greedy", "uniform")
    )
    assert greedy[0][0] <= even[0][0]
    assert greedy[1][-1] < even[1][-1]


def test_the_mean_share_on_a_model_is_the_one_asked_for() -> None:
    model = family("llama")
    layers = find_sites(model)
    targets = [(layer.index, site, module) for layer in layers for site, module in (
        ("attn_in", layer.attention_in[0]), ("attn_out", layer.attention_out), ("up", layer.up[0]),
        ("down", layer.down))]  # fmt: skip
    seen: dict[tuple[int, str], float] = {}
    with approximate(model, "teal:0.5,split=greedy,threshold=magnitude,prefill=1", calibration_rows=CALIBRATION):
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, key=(index, site): seen.__setitem__(key, float((args[0] == 0).float().mean()))
            )
            for index, site, module in targets
        ]
        with torch.no_grad():
            model(input_ids=HELD_OUT)
    for handle in handles:
        handle.remove()
    for layer in layers:
        sizes = site_sizes(layer)
        assert sizes == {"attn_in": 32 * 32 + 2 * 32 * 16, "attn_out": 32 * 32, "up": 2 * 32 * 48, "down": 32 * 48}
        shares = {site: seen[layer.index, site] for site in sizes}
        assert mean(shares, sizes) == pytest.approx(0.5, abs=0.03)  # type: ignore[arg-type]
        assert max(shares.values()) - min(shares.values()) > 0.2


def test_experts_count_as_often_as_a_token_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four here: sparsity in the other two would save nothing, so attention weighs twice as much."""
    model = family("mixtral")
    layers = find_sites(model)
    calibration = collect(model, layers, CALIBRATION)
    asked: list[dict[Site, float]] = []

    def noted(sizes: dict[Site, float], share: float, error: object) -> Shares:
        asked.append(sizes)
        return dict.fromkeys(sizes, share)

    monkeypatch.setattr(greedy, "allocate", noted)
    greedy_shares(Subject(model, layers, Rows(), lambda: calibration), layers, 0.5, lambda *_: [])
    attention = {"attn_in": 32 * 32 + 2 * 32 * 16, "attn_out": 32 * 32}
    assert asked == 2 * [{**attention, "up": 2 * 2 * 32 * 48, "down": 2 * 32 * 48}]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_runs_under_its_name_and_leaves_no_trace() -> None:
    loaded = tiny_model()
    model = loaded.model.train()
    model.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    ids = torch.tensor([[2, 5, 6, 7, 8, 9, 10]])
    before = model(input_ids=ids).logits
    with approximate(loaded, "teal:0.5,split=greedy") as active:
        assert active.label == "teal:share=0.5,prefill=0.5,split=greedy"
        assert any("greedy" in note for note in active.notes)
        changed = model(input_ids=ids).logits
    assert torch.isfinite(changed).all() and not torch.equal(changed, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
