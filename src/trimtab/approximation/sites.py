"""The places of a decoder where activations may be approximated, found by watching one tiny forward pass.

Nothing here is a list of attribute names. Decoder layers are the model's longest list of equal modules. In each layer
the feed-forward block is the child that holds an activation function, attention the other child that holds linear
maps, norms the children whose only weight is a vector. Inside a block, what reads the block's own input is its input
projection, what writes its output is its output projection: data flow, seen through hooks.

Covered: dense decoder layers with separate or fused projections, adapters around any of them (PEFT), Transformers'
fused experts (one stacked weight for all experts). Not covered: layers that run attention and feed-forward on other
things than hidden states, experts beside a shared expert, state-space layers: those raise and say what was looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import ModelError

Site = Literal["attn_in", "attn_out", "up", "activation", "down", "softmax", "query", "key", "value", "norm"]
INPUT_SITES: tuple[Site, ...] = ("attn_in", "attn_out", "up", "down")  # inputs of linear maps


@dataclass(frozen=True)
class LayerSites:
    """One decoder layer.

    Attributes:
        index: 0 is nearest the input. layer: the module itself.
        attention, attention_in, attention_out: the block; the maps that read its input (q, k, v, or one fused); the
            map that writes its output.
        mlp: the module whose first argument is the input of the up projection (the block, or its experts).
        up: the maps that read that input (gate and up, or one fused); empty for experts.
        activation: the activation function's module. down: the map that writes the block's output; None for experts.
        norms: modules with one vector of weights.
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    attention_in: tuple[nn.Module, ...]
    attention_out: nn.Module
    mlp: nn.Module
    up: tuple[nn.Module, ...]
    activation: nn.Module
    down: nn.Module | None
    norms: tuple[nn.Module, ...]

    @property
    def experts(self) -> bool:
        """Whether the feed-forward block is a mixture with stacked expert weights."""
        return self.down is None


class Call(NamedTuple):
    """First tensor in and out of one module call."""

    entered: Tensor | None
    left: Tensor | None


def base_of(model: Any) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_sites(model: Any) -> tuple[LayerSites, ...]:
    """All layers' sites, nearest the input first.

    Raises:
        ModelError: where a layer lacks a site; the message says which, and what was looked for.
    """
    base = base_of(model)
    hidden = base.config.get_text_config().hidden_size
    layers = decoder_layers(base)
    calls = watch(base, layers)
    return tuple(_layer_sites(index, layer, hidden, calls) for index, layer in enumerate(layers))


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The longest ``ModuleList`` of modules of one class that hold linear maps.

    Raises:
        ModelError: where there is none.
    """
    lists = [list(module) for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [found for found in lists if len({type(layer) for layer in found}) == 1 and any(linears(found[0]))]
    if not stacks:
        raise _missing("a list of equal decoder layers with linear maps", base)
    return max(stacks, key=len)


def linears(module: nn.Module) -> Iterator[nn.Module]:
    """Outermost linear maps under a module: plain, quantised or wrapped by an adapter."""
    for child in module.children():
        if is_linear(child):
            yield child
        else:
            yield from linears(child)


def is_linear(module: nn.Module) -> bool:
    """Has the two sizes that every linear layer and every adapter around one carries."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def activation_classes() -> tuple[type[nn.Module], ...]:
    """Every class that Transformers may put as an activation function, and PyTorch's own."""
    from transformers.activations import ACT2CLS

    found = [entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()]
    return tuple({cls for cls in found if isinstance(cls, type)} | {nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh})


def activation_kind(module: nn.Module) -> str:
    """What an activation module computes, by trying it: "silu", "gelu", "gelu_tanh", else its class name."""
    grid = torch.linspace(-6, 6, 241)
    with torch.no_grad():
        seen = module(grid.clone())
    exact = {
        "silu": nn.functional.silu(grid),
        "gelu": nn.functional.gelu(grid),
        "gelu_tanh": nn.functional.gelu(grid, approximate="tanh"),
    }
    return next(
        (name for name, value in exact.items() if torch.allclose(seen, value, atol=1e-5)), type(module).__name__
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside a ``with`` block; then each module has its own mode again (a frozen one may differ)."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def watch(base: Any, layers: list[nn.Module]) -> dict[nn.Module, Call]:
    """One forward pass over two tokens; the first call of every module inside the layers."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(module, Call(first_tensor([*args, *kwargs.values()]), first_tensor([output])))

    handles = [module.register_forward_hook(note, with_kwargs=True) for layer in layers for module in layer.modules()]
    try:
        with evaluating(base), torch.no_grad():
            base(input_ids=torch.tensor([[1, 2]], device=next(base.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of floating numbers in nested sequences."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, tuple | list) and (found := first_tensor(value)) is not None:
            return found
    return None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """The same values in memory, whatever their shape."""
    if one is None or other is None:
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _layer_sites(index: int, layer: nn.Module, hidden: int, calls: dict[nn.Module, Call]) -> LayerSites:
    blocks = [child for child in layer.children() if child in calls]
    acts = activation_classes()
    feeds = [block for block in blocks if any(isinstance(module, acts) for module in block.modules())]
    if len(feeds) != 1:
        raise _missing("one feed-forward block, a child that holds an activation function", layer, index)
    attends = [block for block in blocks if block is not feeds[0] and any(linears(block))]
    if len(attends) != 1:
        raise _missing("one attention block, a child with linear maps and no activation function", layer, index)
    attention = attends[0]
    reads, writes = _ends(attention, calls)
    if not reads or writes is None:
        raise _missing("attention's projections: maps that read its input, one that writes its output", layer, index)
    norms = tuple(block for block in blocks if _is_norm(block, hidden))
    mlp, up, activation, down = _feed_forward(index, feeds[0], calls)
    return LayerSites(index, layer, attention, reads, writes, mlp, up, activation, down, norms)


def _ends(block: nn.Module, calls: dict[nn.Module, Call]) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
    """Linear maps that read a block's input, and the one that writes its output."""
    own, maps = calls[block], [found for found in linears(block) if found in calls]
    reads = tuple(found for found in maps if _same(calls[found].entered, own.entered))
    writes = next((found for found in maps if _same(calls[found].left, own.left)), None)
    return reads, writes


def _feed_forward(
    index: int, block: nn.Module, calls: dict[nn.Module, Call]
) -> tuple[nn.Module, tuple[nn.Module, ...], nn.Module, nn.Module | None]:
    acts = [module for module in block.modules() if isinstance(module, activation_classes())]
    stacked = [module for module in block.modules() if is_experts(module)]
    if stacked:
        if len(stacked) > 1 or any(linears(block)):
            raise _missing(
                "one stack of experts and nothing beside it (a shared expert is not supported)", block, index
            )
        return stacked[0], (), acts[0], None
    up, down = _ends(block, calls)
    if not up or down is None or len(acts) != 1:
        raise _missing("maps that read the block's input, one activation, one map that writes its output", block, index)
    return block, up, acts[0], down


def is_experts(module: nn.Module) -> bool:
    """Transformers' stacked experts: 3-D weights for gate and up together, and for down."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in (up, down))


def _is_norm(module: nn.Module, hidden: int) -> bool:
    weights = list(module.parameters())
    return not list(module.children()) and len(weights) == 1 and tuple(weights[0].shape) == (hidden,)


def _missing(wanted: str, module: nn.Module, index: int | None = None) -> ModelError:
    where = "this model" if index is None else f"layer {index} of this model"
    held = ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children())
    return ModelError(
        f"{where} lacks a site that the approximation needs; looked for {wanted}",
        seen=f"{type(module).__name__} with {held or 'no children'}"[:400],
        fix="use a decoder of the Llama, Mistral, Mixtral, Qwen, Gemma or Phi-3 kind",
    )
