"""Put approximations on a model and take them off without a trace.

Everything is hooks, plus (only where asked for) the model's attention implementation and the forward of
stacked experts; all three are restored exactly, so logits afterwards are bit for bit those of before.

Covered: composition, adapters (PEFT), generation, any cache, batches with padding, a shared prefix read once (unless a
technique needs whole rows, which ``prefix.supports`` is told), ``torch.compile`` after approximating.
Not covered: two approximations of one model at once (compose them with "+"), a model compiled before (refused).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.approximation.attention import AttentionEdits, switch_on
from trimtab.approximation.compiled import refuse_compiled
from trimtab.approximation.experts import open_experts
from trimtab.approximation.naming import parse
from trimtab.approximation.ranges import Guarded
from trimtab.approximation.sites import LayerSites, Site, base_of, find_sites
from trimtab.approximation.technique import Edit, Rows, Subject, Technique
from trimtab.errors import UsageError

Undo = Callable[[], None]
LABEL, WHOLE_ROWS = "_trimtab_approximation", "_trimtab_whole_rows"


class Approximation:
    """What is on a model now. ``label``: canonical string; ``notes``: what a reader must know of each technique;
    ``rows``: the tokens that it sees."""

    def __init__(self, base: Any, label: str, notes: list[str], edits: Sequence[Edit], rows: Rows, undo: Undo) -> None:
        self.base, self.label, self.notes, self.edits, self.rows, self._undo = base, label, notes, edits, rows, undo

    def out_of_range(self, site: Site = "activation") -> dict[int, tuple[float, float, float]]:
        """Layer -> share of values outside a polynomial's range at a site so far, smallest and largest value seen."""
        own = [edit.function for edit in self.edits if edit.site == site]
        counted = {one.layer: one.counted for one in own if isinstance(one, Guarded)}
        return {layer: (seen.share, seen.low, seen.high) for layer, seen in counted.items() if seen.total}

    def remove(self) -> None:
        """Take it off; a second call does nothing."""
        undo, self._undo = self._undo, lambda: None
        undo()


@contextmanager
def approximate(
    model: Any, name: str, *, calibration: Any = None, calibration_rows: Sequence[Sequence[int]] | None = None
) -> Iterator[Approximation]:
    """Approximate a model inside a ``with`` block.

    Args:
        model: a Transformers causal model, one in a PEFT wrapper, or a ``LoadedModel``.
        name: e.g. "teal:0.5", "bolt+a8", "noise:up=0.05,layers=0-3".
        calibration: a ``Calibration`` collected before, for techniques that need one.
        calibration_rows: token ids to calibrate on; default: bundled instructions by the model's own chat template.

    Raises:
        UsageError: an unknown name, a value out of range, a model that is approximated already.
        ModelError: the model has no such site. ApproximationError: a compiled model; the technique does not fit the
            model, or (while it runs) left its range.
    """
    active = attach(model, name, calibration=calibration, calibration_rows=calibration_rows)
    try:
        yield active
    finally:
        active.remove()


def attach(
    model: Any, name: str, *, calibration: Any = None, calibration_rows: Sequence[Sequence[int]] | None = None
) -> Approximation:
    """As ``approximate``, until ``remove`` is called."""
    techniques = parse(name)
    inner = getattr(model, "model", model) if hasattr(model, "tokenizer") else model
    refuse_compiled(inner)
    base = base_of(inner)
    if active_label(base):
        raise UsageError(
            "this model is approximated already", seen=active_label(base), fix='compose in one name: "bolt+a8"'
        )
    layers, rows = find_sites(base), Rows()
    check_layers(techniques, layers)
    found: list[Any] = [calibration]

    def calibrated() -> Any:
        if found[0] is None:
            from trimtab.approximation.calibration import collect, rows_for

            found[0] = collect(base, layers, calibration_rows or rows_for(model, base))
        return found[0]

    subject = Subject(base, layers, rows, calibrated)
    edits = [edit for technique in techniques for edit in edits_of(technique, subject)]
    notes = [note for technique in techniques for note in technique.notes(subject)]
    label = "+".join(technique.label for technique in techniques)
    undo = install(base, layers, edits, rows)
    setattr(base, LABEL, label)
    setattr(base, WHOLE_ROWS, any(technique.whole_rows for technique in techniques))

    def clean() -> None:
        delattr(base, LABEL)
        delattr(base, WHOLE_ROWS)
        undo()

    return Approximation(base, label, notes, edits, rows, clean)


def active_label(model: Any) -> str:
    """The canonical name of what is on a model, or ""."""
    return str(getattr(base_of(model), LABEL, ""))


@contextmanager
def installed(base: Any, layers: Sequence[LayerSites], edits: Sequence[Edit], rows: Rows) -> Iterator[None]:
    """Edits inside a ``with`` block, without a name."""
    undo = install(base, layers, edits, rows)
    try:
        yield
    finally:
        undo()


def install(base: Any, layers: Sequence[LayerSites], edits: Sequence[Edit], rows: Rows) -> Undo:
    """Install edits in order; returns what removes them all."""
    undo: list[Undo] = [_watch_rows(base, rows)]
    try:
        for layer in layers:
            own = [edit for edit in edits if edit.layer == layer.index]
            if own:
                undo += _install_layer(layer, own, rows)
        attention = {layer.attention: found for layer in layers if (found := _attention_edits(layer.index, edits))}
        if attention:
            undo.append(switch_on(base, attention))
    except BaseException:
        _run_backwards(undo)
        raise
    return lambda: _run_backwards(undo)


def _run_backwards(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _install_layer(layer: LayerSites, edits: Sequence[Edit], rows: Rows) -> list[Undo]:
    targets: dict[str, nn.Module | None] = {
        "attn_in": layer.attention,
        "attn_out": layer.attention_out,
        "up": layer.mlp,
        "down": layer.down,
    }
    undo: list[Undo] = []
    for edit in edits:
        if edit.site in targets:
            target = targets[edit.site]
            if edit.linear is not None:
                target = {"attn_in": layer.attention_in, "up": layer.up}[edit.site][edit.linear]
            if target is not None:
                undo.append(_before(target, edit.function))
        elif edit.site == "activation":
            undo.append(_instead(layer.activation, edit.function))
        elif edit.site == "norm":
            undo += [_scaled_norm(norm, edit.function) for norm in layer.norms]
    if layer.experts and any(edit.site in ("activation", "down") for edit in edits):
        downs = [edit.function for edit in edits if edit.site == "down"]
        undo.append(open_experts(layer.mlp, downs, rows))
    return undo


def _before(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Undo:
    """Change the module's input: its first positional argument, or ``hidden_states``."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _instead(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Undo:
    """Put a function in the place of an activation module."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return function(args[0]).to(output.dtype)

    return module.register_forward_hook(hook).remove


def _scaled_norm(module: nn.Module, inverse_root: Callable[[Tensor], Tensor]) -> Undo:
    """RMS norm with another 1/sqrt, applied to the sum of squares; right for any convention of the weight."""
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 0.0)

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        squares = args[0].float().square().sum(-1, keepdim=True) + args[0].shape[-1] * epsilon
        changed: Tensor = output.float() * (inverse_root(squares) * squares.sqrt())
        return changed.to(output.dtype)

    return module.register_forward_hook(hook).remove


def _attention_edits(layer: int, edits: Sequence[Edit]) -> AttentionEdits | None:
    """The functions of one layer's attention, composed in order; None where there are none."""
    own = [edit for edit in edits if edit.layer == layer and edit.site in ("query", "key", "value", "softmax")]
    if not own:
        return None
    if sum(edit.site == "softmax" for edit in own) > 1:
        raise UsageError("two techniques replace the softmax's exponential", fix="give one of them softmax=no")
    found = AttentionEdits()
    for edit in own:
        field = "exp" if edit.site == "softmax" else edit.site
        before = getattr(found, field)
        setattr(found, field, edit.function if before is None else _after(before, edit.function))
    return found


def _after(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _watch_rows(base: nn.Module, rows: Rows) -> Undo:
    """Note positions, ids and padding of each forward pass."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        shaped = ids if ids is not None else kwargs.get("inputs_embeds")
        if shaped is None:
            return
        count, width = shaped.shape[:2]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            rows.real = mask[:, -width:].bool()
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        else:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = int(cache.get_seq_length()) if cache is not None else 0
            rows.real = torch.ones(count, width, dtype=torch.bool, device=shaped.device)
            positions = (past + torch.arange(width, device=shaped.device)).expand(count, width)
        given = kwargs.get("position_ids")
        rows.positions = given.expand(count, width) if isinstance(given, Tensor) and given.dim() == 2 else positions
        rows.ids = ids if ids is not None else torch.zeros_like(rows.positions)

    return base.register_forward_pre_hook(hook, with_kwargs=True).remove


def edits_of(technique: Technique, subject: Subject) -> Sequence[Edit]:
    """A technique's edits, of which there are some: whoever applies one, in training too, asks here.

    Raises:
        UsageError: as ``check_layers``. ApproximationError: as ``Technique.edits``.
    """
    check_layers([technique], subject.layers)
    return technique.edits(subject)


def check_layers(techniques: Sequence[Technique], layers: Sequence[LayerSites]) -> None:
    """Refuse a range of layers that the model does not have: it would change nothing, silently.

    Raises:
        UsageError: names the technique and the model's layers.
    """
    for technique in techniques:
        if not any(layer.index in technique.layers for layer in layers):
            seen = f"{technique.label}; the model has layers 0 to {len(layers) - 1}"
            raise UsageError("that range holds no layer of this model", seen=seen, fix="choose layers=FIRST-LAST")
