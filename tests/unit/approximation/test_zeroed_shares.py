"""TEAL and CATS on whole models: which share is zeroed on held-out rows, which values, which tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.approximation.families import family, token_rows
from torch import Tensor, nn

from trimtab import approximate
from trimtab.approximation.calibration import collect
from trimtab.approximation.sites import find_sites

CALIBRATION = token_rows(60, 24, seed=1)
HELD_OUT = torch.tensor(token_rows(40, 24, seed=2))


def inputs_of(model: Any, ids: Tensor, names: dict[str, str]) -> dict[tuple[int, str], Tensor]:
    """What the named maps of each layer read, hooked after the approximation, so as it leaves them."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for key, name in names.items():

            def note(_: nn.Module, args: Any, key: tuple[int, str] = (index, key)) -> None:
                found[key] = args[0].clone()

            handles.append(layer.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
PHI3 = {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("threshold", ["histogram", "magnitude"])
@pytest.mark.parametrize(("name", "maps"), [("llama", LLAMA), ("gemma2", LLAMA), ("phi3", PHI3)])
def test_every_map_reads_that_share_of_zeros_on_held_out_rows(
    name: str, maps: dict[str, str], threshold: str, share: float
) -> None:
    model = family(name)
    with approximate(model, f"teal:{share},prefill=1,threshold={threshold}", calibration_rows=CALIBRATION):
        seen = inputs_of(model, HELD_OUT, maps)
    assert len(seen) == 2 * len(maps)
    zeroed = {key: float((value == 0).float().mean()) for key, value in seen.items()}
    # The histogram's share holds for values symmetric about zero, which a random model's are not quite. The inputs of o
    # and down are sums and products of what zeros have made smaller, so more of them fall below a threshold.
    below, above = (0.012, 0.012) if threshold == "magnitude" else (0.08, 0.06)
    for (layer, key), found in zeroed.items():
        assert share - below <= found <= share + (0.11 if key in ("o", "down") else above), (layer, key, found)


def test_a_threshold_by_magnitude_is_exact_where_the_histogram_s_assumption_fails() -> None:
    """All activations shifted to one side: not symmetric about zero."""
    model = family("llama")

    def shifted(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.abs() + 0.1

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(shifted)
    shares = {}
    for threshold in ("histogram", "magnitude"):
        with approximate(model, f"teal:0.5,prefill=1,threshold={threshold}", calibration_rows=CALIBRATION):
            seen = inputs_of(model, HELD_OUT, {"q": LLAMA["q"]})
        shares[threshold] = float((seen[0, "q"] == 0).float().mean())
    assert shares["magnitude"] == pytest.approx(0.5, abs=0.03)
    assert shares["histogram"] > 0.7  # the 75th percentile of positive values


def test_the_thresholds_are_the_quantiles_of_the_calibration_rows() -> None:
    """Values read by the maps are the exact ones above a threshold that NumPy finds, zero below it."""
    model = family("llama")
    exact = inputs_of(model, torch.tensor(CALIBRATION), {"q": LLAMA["q"]})[0, "q"].numpy().ravel()
    held = inputs_of(model, HELD_OUT, {"q": LLAMA["q"]})[0, "q"]
    wanted = {
        "magnitude": float(np.quantile(np.abs(exact), 0.5)),
        "histogram": float(np.float16(np.quantile(exact, 0.75))),
    }
    for threshold, limit in wanted.items():
        with approximate(model, f"teal:0.5,prefill=1,threshold={threshold}", calibration_rows=CALIBRATION):
            seen = inputs_of(model, HELD_OUT, {"q": LLAMA["q"]})[0, "q"]
        unclear = (held.abs() - limit).abs() < 0.02 * limit  # the thresholds come from a sample of the values
        assert torch.equal(seen[~unclear], torch.where(held.abs() > limit, held, 0.0)[~unclear])
        assert float(unclear.float().mean()) < 0.05


def test_in_a_prompt_the_last_half_alone_is_touched_and_in_decoding_every_token() -> None:
    model = family("llama")
    with approximate(model, "teal:0.5", calibration_rows=CALIBRATION), torch.no_grad():
        prompt = inputs_of(model, HELD_OUT, {"q": LLAMA["q"]})[0, "q"] == 0
        cache = model(input_ids=HELD_OUT[:, :23], use_cache=True).past_key_values
        seen: list[Tensor] = []
        handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0] == 0)
        )
        model(input_ids=HELD_OUT[:, 23:], cache=cache)
        handle.remove()
    assert not prompt[:, :12].any()
    assert float(prompt[:, 12:].float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(seen[0].float().mean()) == pytest.approx(0.5, abs=0.06)


def activations(model: Any, ids: Tensor) -> list[Tensor]:
    """Each layer's activation: its input, then its output."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda _, args, output: found.extend((args[0].clone(), output.clone())))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("name", "function"), [
    ("llama", nn.functional.silu), ("gemma2", lambda x: nn.functional.gelu(x, approximate="tanh")),
])  # fmt: skip
def test_cats_zeroes_the_smallest_activations_and_keeps_the_rest(
    name: str, function: Callable[[Tensor], Tensor], share: float
) -> None:
    model = family(name)
    calibrated = activations(model, torch.tensor(CALIBRATION))
    with approximate(model, f"cats:{share}", calibration_rows=CALIBRATION):
        seen = activations(model, HELD_OUT)
    for layer in range(2):
        given, left = seen[2 * layer], seen[2 * layer + 1]
        limit = float(np.quantile(np.abs(calibrated[2 * layer + 1].numpy()), share))
        full = function(given)
        unclear = (full.abs() - limit).abs() < 0.03 * limit
        assert torch.allclose(left[~unclear], torch.where(full.abs() > limit, full, 0.0)[~unclear], rtol=1e-6, atol=0)
        zeroed = float((left == 0).float().mean())
        assert zeroed == pytest.approx(share, abs=0.03 if layer == 0 else 0.06)


def test_calibration_keeps_the_activations_that_cats_cuts() -> None:
    model = family("llama")
    values = collect(model, find_sites(model), CALIBRATION).values[0, "activation"]
    wanted = activations(model, torch.tensor(CALIBRATION))[1].flatten()
    assert np.quantile(values.numpy(), [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(wanted.numpy(), [0.1, 0.5, 0.9]), rel=0.05
    )
