"""A guard's state on disk: tensors in safetensors, the rest in JSON, bound together by a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError
from trimtab.gradients.factors import Factors, SafetyGradient
from trimtab.tuning.likely import Likely

TENSORS = "trimtab_guard.safetensors"
RECORD = "trimtab_guard.json"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a guard's ``state_dict()`` into a checkpoint folder; each file is written aside and moved into place."""
    tensors = {f"reference.{side}": value.contiguous() for side, value in state["references"].items()}
    tensors |= {
        f"likely.{side}.{part}": value.contiguous()
        for side, likely in state["likely"].items()
        if likely is not None
        for part, value in likely._asdict().items()
    }
    tensors |= {f"rule.{name}": value.contiguous() for name, value in state.get("tensors", {}).items()}
    partial = folder / (TENSORS + ".partial")
    save_file(tensors, partial)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    anchors: SafetyAnchors = state["anchors"]
    record = {
        "rule": state["rule"],
        "cursors": state["cursors"],
        "counters": state["counters"],
        "anchors": {**asdict(anchors), "anchors": [asdict(anchor) for anchor in anchors.anchors]},
        "anchors_sha256": anchors.sha256,
        "tensors_sha256": digest,
    }
    partial.replace(folder / TENSORS)
    text = folder / (RECORD + ".partial")
    text.write_text(json.dumps(record, indent=1))
    text.replace(folder / RECORD)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        GuardError: when it is missing or its two files do not belong together.
    """
    if not (folder / RECORD).is_file() or not (folder / TENSORS).is_file():
        raise GuardError(
            "the checkpoint holds no guard state, so the aligned model's references are lost",
            seen=folder,
            fix="resume from a checkpoint of a guarded run, or start a new one",
        )
    record = json.loads((folder / RECORD).read_text())
    if hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() != record["tensors_sha256"]:
        raise GuardError(
            "the guard state of the checkpoint is damaged", seen=folder / TENSORS, fix="use an earlier one"
        )
    stored = record.pop("anchors")
    anchors = tuple(Anchor(**anchor) for anchor in stored.pop("anchors"))
    stored_tensors = load_file(folder / TENSORS)
    held = SafetyAnchors(anchors=anchors, **stored)
    if held.sha256 != record.pop("anchors_sha256", held.sha256):
        raise GuardError(
            "the guard's anchors in the checkpoint are damaged", seen=folder / RECORD, fix="use an earlier one"
        )
    references = _under("reference.", stored_tensors)
    rule = _under("rule.", stored_tensors)
    kept = {side: _under(f"likely.{side}.", stored_tensors) for side in references}
    return {
        **record,
        "anchors": held,
        "references": references,
        "likely": {side: Likely(**parts) if parts else None for side, parts in kept.items()},
        "tensors": rule,
    }


def pack_gradient(gradient: SafetyGradient) -> dict[str, Tensor]:
    """An anchor gradient as named tensors on the CPU that share no memory, as safetensors wants them.

    Blocks are numbered: their sums must be taken in the same order again, or the last bits differ.
    """
    named = {"loss": torch.tensor(gradient.loss, dtype=torch.float64)}
    for place, (name, both) in enumerate(gradient.factored.items()):
        named |= {f"D.{place:06}.{name}": both.D, f"X.{place:06}.{name}": both.X}
    named |= {f"dense.{place:06}.{name}": block for place, (name, block) in enumerate(gradient.dense.items())}
    return {name: value.detach().to("cpu", copy=True) for name, value in named.items()}


def unpack_gradient(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> SafetyGradient:
    """What ``pack_gradient`` packed, each block on its parameter's device.

    Copied: a file's tensors lie at odd addresses, where matrix products round differently.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for part in ("D", "X", "dense"):
        numbered = sorted(_under(f"{part}.", tensors).items())
        named = {key.partition(".")[2]: value for key, value in numbered}
        parts[part] = {name: value.to(parameters[name].device, copy=True) for name, value in named.items()}
    factored = {name: Factors(D, parts["X"][name]) for name, D in parts["D"].items()}
    return SafetyGradient(float(tensors["loss"]), factored, parts["dense"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def require_same_requests(named: SafetyAnchors, kept: SafetyAnchors) -> None:
    """Refuse to go on with other anchors than a run began with; the aligned model may have answered fewer than named.

    Raises:
        GuardError: where the checkpoint holds requests that are not among the named ones.
    """
    asked = {(anchor.side, anchor.request) for anchor in named.anchors}
    other = [anchor.request for anchor in kept.anchors if (anchor.side, anchor.request) not in asked]
    if other:
        raise GuardError(
            "the checkpoint was guarded with other anchors",
            seen=f"{len(other)} of {len(kept.anchors)} requests in it are not among those named, such as {other[0]!r}",
            fix="resume with the same --guard_anchors, or start a new run",
        )
