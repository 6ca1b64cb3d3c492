"""Which modules of each family are a layer's sites, by name; watching a model leaves every module's mode as it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tests.unit.approximation.families import FAMILIES, family, token_rows
from torch import Tensor, nn

from trimtab.approximation.apply import installed
from trimtab.approximation.sites import Site, evaluating, find_sites
from trimtab.approximation.technique import Edit, Rows


class Names(NamedTuple):
    """Of one layer's modules, within the layer."""

    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    activation: str = "mlp.act_fn"
    down: str | None = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


SANDWICH = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
WANTED = {
    "llama": Names(),
    "mistral": Names(),
    "mixtral": Names(mlp="mlp.experts", up=(), activation="mlp.experts.act_fn", down=None),
    "qwen2": Names(),
    "qwen2.5": Names(),
    "qwen3": Names(),
    "gemma2": Names(norms=SANDWICH),
    "gemma3": Names(norms=SANDWICH),
    "phi3": Names(
        attention_in=("self_attn.qkv_proj",),
        up=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_site_is_the_module_of_that_name(name: str) -> None:
    model = family(name)
    called = {module: key for key, module in model.named_modules()}
    for index, layer in enumerate(find_sites(model)):
        at = f"model.layers.{index}."
        assert layer.index == index and called[layer.layer] == at[:-1]
        assert called[layer.attention] == at + "self_attn"
        seen = Names(
            tuple(called[module].removeprefix(at) for module in layer.attention_in),
            called[layer.attention_out].removeprefix(at),
            called[layer.mlp].removeprefix(at),
            tuple(called[module].removeprefix(at) for module in layer.up),
            called[layer.activation].removeprefix(at),
            None if layer.down is None else called[layer.down].removeprefix(at),
            tuple(called[module].removeprefix(at) for module in layer.norms),
        )
        assert seen == WANTED[name]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_an_edit_at_a_site_is_what_the_named_maps_read(name: str) -> None:
    """Every map of the site gets the edited input, no other map does."""
    model = family(name)
    layers = find_sites(model)
    wanted = WANTED[name]
    readers: dict[Site, tuple[str, ...]] = {
        "attn_in": wanted.attention_in,
        "attn_out": (wanted.attention_out,),
        "up": wanted.up,
        "down": (str(wanted.down),),
    }
    linears = {key: one for key, one in layers[1].layer.named_modules() if isinstance(one, nn.Linear)}
    assert set(linears) == {key for keys in readers.values() for key in keys}
    for site, keys in readers.items():
        got: dict[str, Tensor] = {}

        def note(module: nn.Module, args: Any, got: dict[str, Tensor] = got) -> None:
            got[next(key for key, one in linears.items() if one is module)] = args[0]

        with installed(model, layers, [Edit(1, site, lambda x: torch.full_like(x, 7.0))], Rows()), torch.no_grad():
            handles = [one.register_forward_pre_hook(note) for one in linears.values()]
            model(input_ids=torch.tensor(token_rows(1, 5)))
        for handle in handles:
            handle.remove()
        assert {key for key, value in got.items() if bool((value == 7.0).all())} == set(keys), site


def partly_frozen() -> Any:
    model = family("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.act_fn.eval()
    return model


def test_finding_sites_restores_each_module_s_own_mode() -> None:
    model = partly_frozen()
    modes = {key: module.training for key, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    find_sites(model)
    assert {key: module.training for key, module in model.named_modules()} == modes


def test_modes_are_restored_after_an_error_too() -> None:
    model = partly_frozen()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), evaluating(model):
        fail()
    assert [module.training for module in model.modules()] == modes
