"""What every way of hardening takes and leaves: an exact model, an adapter that is written whole or not at all.

Covered: refusing what is no exact model, saving, reloading to compare. Not covered: training (``harden.py``,
``distill.py``).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab import models
from trimtab.approximation.apply import active_label
from trimtab.approximation.sites import base_of
from trimtab.errors import ModelError, UsageError
from trimtab.exact_model import require_exact
from trimtab.model_names import DEMO_NAMES, ModelSpec
from trimtab.models import LoadedModel
from trimtab.vetting.shrink import Shrunk

WEIGHTS = "adapter_model.safetensors"  # where it is, an adapter is finished


@dataclass(frozen=True)
class Hardened:
    """What came out: ``folder`` holds the adapter; ``rows`` rows trained on; ``loss`` mean training loss; ``size`` what
    the adapter's size was set to, where the method sets it."""

    folder: str
    rows: int
    steps: int
    loss: float
    seconds: float
    size: Shrunk | None = None


def check_start(model: str, out: Path, loaded: LoadedModel | None) -> None:
    """Before anything is loaded or written: what is trained must be an exact model, the reference for everything else.

    Raises:
        UsageError: ``out`` holds an adapter; a model with an approximation or an adapter, in its name or in memory.
    """
    if (out / WEIGHTS).is_file():
        raise UsageError("that folder holds a finished adapter", seen=out, fix="name another --out")
    require_exact(model, "harden", ", use --noise")
    spec = ModelSpec.parse(model)
    if loaded is not None and (label := active_label(loaded.model)):
        raise UsageError("harden takes the exact model", seen=label, fix="leave its approximation first")
    adapted = spec.adapter or (Path(spec.location) / "adapter_config.json").is_file()
    if adapted or (loaded is not None and base_of(loaded.model) is not loaded.model):
        fix = "merge it first: trimtab convert"
        raise UsageError("hardening trains an adapter of its own", seen=model, fix=fix)


def save(model: Any, loaded: LoadedModel, out: Path, record: dict[str, Any]) -> None:
    """Write the adapter and where it came from; it is in ``out`` once it reloads, the weights last.

    Raises:
        ModelError: where it gives other logits; it then stays in a folder of its own.
    """
    partial = out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), save_embedding_layers=False)  # else PEFT asks the hub for the base
    (partial / "trimtab.json").write_text(json.dumps(record, indent=1))
    verify(partial, model, loaded)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == WEIGHTS):
        if path.name != "README.md" or not (out / path.name).exists():  # PEFT's is a form to fill in
            path.replace(out / path.name)
    shutil.rmtree(partial)


def verify(folder: Path, model: Any, loaded: LoadedModel) -> None:
    """Reload the adapter on a fresh base and compare logits; a base that exists only in memory cannot be reloaded.

    Raises:
        ModelError: where they differ by more than rounding.
    """
    location = ModelSpec.parse(loaded.name).location
    if not (Path(location).exists() or location in (*DEMO_NAMES, loaded.model.name_or_path)):
        return
    again = models.load(loaded.name, adapter=str(folder), device=str(loaded.device))
    ids = torch.tensor([loaded.tokenizer("How do I bake bread?")["input_ids"]], device=loaded.device)
    with torch.no_grad():
        gap = float((model(input_ids=ids).logits.float() - again.model(input_ids=ids).logits.float()).abs().max())
    if not gap <= 1e-2:
        seen = f"gap {gap:.3g}"
        fix = f"do not use {folder}; report this with the command"
        raise ModelError("the saved adapter does not give the logits of the model in memory", seen=seen, fix=fix)
