"""The repair as a second LoRA adapter on the given model, and as one adapter on disk.

A model that is itself a base with an adapter keeps both apart while the repair is made: no adapter is the aligned
ancestor, the given adapter alone is the broken model, both together are the repaired one. On disk the two become one
adapter on the original base, exactly: ``[B1 s1, B2 s2] [A1; A2] = s1 B1 A1 + s2 B2 A2``. A repair may also go on
with the given adapter's own parameters; what they were is kept, and an empty second adapter leaves no trace on disk.

Covered: plain models (also quantised ones) and LoRA on them. Not covered: other kinds of given adapters (DoRA, IA3,
modules saved whole, embeddings): these raise, saying that they can be merged first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor, nn

from trimtab.errors import GuardError, ModelError
from trimtab.four_bits import keep_order
from trimtab.model_names import ModelSpec
from trimtab.models import LoadedModel, content_hash

NAME = "patch"


class LowRank(NamedTuple):
    """``delta W = B A``. ``A``: rank x in, ``B``: out x rank (any scale already in ``B``)."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Workbench:
    """A model with the repair attached.

    Attributes:
        loaded: tokenizer, name, and the PEFT model.
        given: names of the adapters that the model came with; empty for a plain one.
        original: their parameters as they were, where the repair goes on with them; else empty.
    """

    loaded: LoadedModel
    given: tuple[str, ...]
    original: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The PEFT model; the repair and what came with the model are active."""
        return self.loaded.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The repair's parameters by name: the second adapter's, and those of the given ones that are gone on with."""
        return {n: p for n, p in self.model.named_parameters() if f".{NAME}." in n or n in self.original}

    @property
    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers that the repair reaches, by module name."""
        return {name: m for name, m in self.model.named_modules() if NAME in getattr(m, "lora_A", {})}

    @contextmanager
    def as_given(self) -> Iterator[LoadedModel]:
        """The model without the repair."""
        if not self.given:
            with self.as_base() as base:
                yield base
            return
        latest = self.read()
        self.write(latest | self.original)
        self._activate(self.given)
        try:
            yield self.loaded
        finally:
            self._activate((*self.given, NAME))
            self.write(latest)

    @contextmanager
    def as_base(self) -> Iterator[LoadedModel]:
        """The model without the repair and without the adapter that it came with."""
        try:
            with self.model.disable_adapter():
                yield self.loaded
        finally:
            _train_only_repair(self.model, self.original)  # PEFT makes every adapter trainable again

    def read(self) -> dict[str, Tensor]:
        """A copy of the repair's parameters, by name."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put back what ``read`` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self.rest_or_wake()

    @torch.no_grad()
    def place(self, deltas: Mapping[str, LowRank]) -> None:
        """Make the second adapter equal to these low-rank changes (ranks at most its own), by module name."""
        for name, layer in self.layers.items():
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            A.zero_()
            B.zero_()
            if name in deltas:
                rank = deltas[name].A.shape[0]
                A[:rank] = deltas[name].A.to(A)
                B[:, :rank] = deltas[name].B.to(B) / layer.scaling[NAME]
        self.rest_or_wake()

    def rest_or_wake(self) -> None:
        """An empty second adapter rests while the given ones are gone on with: it would cost two products in every
        layer and add nothing."""
        if self.original:
            empty = not any(bool(layer.lora_B[NAME].weight.any()) for layer in self.layers.values())
            self._activate(self.given if empty else (*self.given, NAME))

    def edit(self) -> dict[str, LowRank]:
        """The repair as low-rank changes by module name, with the scale in ``B``."""
        changes = {name: [_factors(layer, NAME)] for name, layer in self.layers.items()}
        for given, name, layer in self._given_layers() if self.original else ():
            now, before = _factors(layer, given), _factors(layer, given, self.original, f"{name}.")
            changes[name] += [now, LowRank(before.A, -before.B)]
        return {name: _stacked(parts) for name, parts in changes.items()}

    def combined(self) -> dict[str, LowRank]:
        """Given adapters and repair as one low-rank change by module name; ranks add, an empty repair has none."""
        changes: dict[str, list[LowRank]] = {}
        for given, name, layer in self._given_layers():
            changes.setdefault(name, []).append(_factors(layer, given))
        for name, layer in self.layers.items():
            repair = _factors(layer, NAME)
            if name not in changes or bool(repair.B.any()):
                changes.setdefault(name, []).append(repair)
        return {name: _stacked(parts) for name, parts in changes.items()}

    def _given_layers(self) -> list[tuple[str, str, Any]]:
        modules = list(self.model.named_modules())
        return [(given, n, m) for given in self.given for n, m in modules if given in getattr(m, "lora_A", {})]

    def size(self) -> float:
        """Euclidean norm of the whole edit over all weights."""
        total = sum(float((d.B.T @ d.B).double().mul((d.A @ d.A.T).double()).sum()) for d in self.edit().values())
        return math.sqrt(max(total, 0.0))

    def _activate(self, names: tuple[str, ...]) -> None:
        self.model.base_model.set_adapter(list(names))
        _train_only_repair(self.model, self.original)


def attach(loaded: LoadedModel, *, rank: int = 8, alpha: int = 16, seed: int = 0, go_on: bool = False) -> Workbench:
    """Add an empty repair (it changes nothing yet) on every linear layer.

    Args:
        loaded: the given model, which is changed in place.
        rank, alpha, seed: of the second adapter.
        go_on: train the parameters of the adapters that the model came with, where it came with any; the second one
            then only holds what ``place`` puts there.

    Raises:
        ModelError: weights that are not finite, or a given adapter of a kind that cannot be combined.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    require_finite(loaded)
    keep_order(loaded.model)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    devices = [loaded.model.device] if loaded.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if isinstance(loaded.model, PeftModel):
            given = tuple(loaded.model.active_adapters)
            _require_combinable(loaded)
            loaded.model.add_adapter(NAME, config)
            model = loaded.model
            model.base_model.set_adapter([*given, NAME])
        else:
            given = ()
            model = get_peft_model(loaded.model, config, adapter_name=NAME)
    original = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if go_on and any(f".{adapter}." in name for adapter in given)
    }
    _train_only_repair(model, original)
    model.eval()  # no dropout anywhere: neither the model's nor the given adapter's
    bench = Workbench(replace(loaded, model=model), given, original)
    if not bench.layers:
        raise ModelError(
            "the model has no linear layer that an adapter could reach",
            seen=type(loaded.model).__name__,
            fix="only transformers with linear layers can be patched",
        )
    bench.rest_or_wake()
    return bench


def detach(bench: Workbench) -> LoadedModel:
    """The model as it was before ``attach``."""
    if bench.given:
        bench.write(bench.read() | bench.original)
        bench.model.delete_adapter(NAME)
        bench.model.base_model.set_adapter(list(bench.given))
        return bench.loaded
    return replace(bench.loaded, model=bench.model.unload())


def require_finite(loaded: LoadedModel) -> None:
    """Raise where a weight of the given model is NaN or infinite: nothing can be repaired there."""
    for name, parameter in loaded.model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            fix = "the training that made this model diverged; patch an earlier checkpoint"
            raise ModelError(f"{loaded.name} holds weights that are not finite", seen=name, fix=fix)


def require_effect(bench: Workbench, least: float = 1e-7) -> float:
    """The size of the edit, or an error where it changed nothing (or is not finite)."""
    size = bench.size()
    if not math.isfinite(size):
        raise GuardError("the repair is not finite", seen=size, fix="lower the learning rate")
    if size < least:
        raise GuardError("the repair changed nothing", seen=f"norm {size:.1e}", fix="raise the learning rate or steps")
    return size


def finish(bench: Workbench) -> Any:
    """One adapter, "default", that holds the given adapter and the repair; a PEFT model, ready for ``save_pretrained``.

    The workbench is used up: its model is the one returned.
    """
    from peft import LoraConfig

    changes, base = bench.combined(), ModelSpec.parse(base_name(bench))
    ranks = {name.removeprefix("base_model.model."): change.A.shape[0] for name, change in changes.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != common},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != common},
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.location,  # PEFT reads no query; dtype and device are the loader's choice
        revision=base.revision,
    )
    model = bench.model
    for name in bench.given:
        model.delete_adapter(name)
    model.add_adapter("default", config)
    model.base_model.set_adapter("default")
    model.delete_adapter(NAME)
    model.set_adapter("default")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in changes and "default" in getattr(module, "lora_A", {}):
                module.lora_A["default"].weight.copy_(changes[name].A)
                module.lora_B["default"].weight.copy_(changes[name].B)
    return model.eval()


def base_name(bench: Workbench) -> str:
    """The name by which ``models.load`` finds the model under the adapters, as the user wrote it but for the adapter.

    Where the name is that of an adapter folder, its configuration names the base.
    """
    location, _, query = bench.loaded.name.partition("?")
    spec = ModelSpec.parse(bench.loaded.name)
    if spec.adapter is None:
        for name in bench.given:
            config = bench.model.peft_config[name]
            if known := config.base_model_name_or_path:
                return with_revision(str(known), spec.revision or config.revision)
    rest = "&".join(part for part in query.split("&") if part.partition("=")[0] != "adapter")
    return f"{location}?{rest}" if rest else location


def with_revision(name: str, revision: str | None) -> str:
    """The model name with this revision of its base (None: as it is)."""
    if revision is None or ModelSpec.parse(name).revision == revision:
        return name
    return f"{name}{'&' if '?' in name else '?'}revision={quote(revision, safe='')}"  # the last of two keys wins


def base_sha256(model: Any) -> str:
    """``models.content_hash(..., rounded=True)`` of the model under the adapters; "" where it is quantised."""
    if getattr(model, "is_quantized", False):
        return ""
    return content_hash(_Plain(model), rounded=True)  # type: ignore[arg-type]


class _Plain:
    """The state of the model under the adapters, with the names that it has without them."""

    def __init__(self, model: Any) -> None:
        self.inner = model.get_base_model()

    def state_dict(self) -> dict[str, Tensor]:
        return {k.replace(".base_layer.", "."): v for k, v in self.inner.state_dict().items() if ".lora_" not in k}


def _factors(layer: Any, adapter: str, kept: Mapping[str, Tensor] | None = None, prefix: str = "") -> LowRank:
    """Of a LoRA layer, or with its parameters taken from ``kept`` (names begin with ``prefix``)."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if kept is not None:
        A, B = (kept[f"{prefix}lora_{side}.{adapter}.weight"] for side in "AB")
    return LowRank(A.detach().float().clone(), B.detach().float() * float(layer.scaling[adapter]))


def _stacked(parts: Sequence[LowRank]) -> LowRank:
    return LowRank(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts], dim=1))


def _train_only_repair(model: Any, original: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in original if original else f".{NAME}." in name)


def _require_combinable(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    fix = f"merge it first, and patch the result: trimtab convert {loaded.name} MERGED"
    for name in model.active_adapters:
        config = model.peft_config[name]
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ModelError("only LoRA adapters can be repaired in place", seen=str(config.peft_type), fix=fix)
        whole = list(config.modules_to_save or ()) + (["biases"] if config.bias != "none" else [])
        if config.use_dora or whole:
            raise ModelError("the given adapter is more than LoRA", seen="DoRA" if config.use_dora else whole, fix=fix)
    if any(getattr(module, "lora_embedding_A", {}) for module in model.modules()):
        raise ModelError("the given adapter changes embeddings", seen=loaded.name, fix=fix)
