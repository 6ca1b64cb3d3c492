"""A repair on disk: an adapter or a merged model, its card, and the check that what was saved is what was made.

Covered: writing beside and moving into place, the base's content hash, the card. Not covered: whether the repair is
good enough to be saved (``verify.py``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab import __version__, models
from trimtab.errors import TrimtabError, UsageError
from trimtab.four_bits import keep_order
from trimtab.models import LoadedModel
from trimtab.patching.adapters import base_sha256

MERGE_TOLERANCE = 1e-4  # largest logit difference, relative to the largest logit, float32
RECORD = "patch.json"


class Scratch:
    """A folder that becomes ``target`` only when everything in it is whole and accepted.

    Raises:
        UsageError: when ``target`` exists and is not an empty folder.
    """

    def __init__(self, target: Path) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(
                "the output folder is not empty: nothing is overwritten", seen=target, fix="name a new one"
            )
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=".patch-", dir=target.parent))

    def accept(self) -> None:
        """Move into place."""
        if self.target.is_dir():
            self.target.rmdir()
        self.path.replace(self.target)

    def drop(self) -> None:
        """Remove what was not accepted; harmless after ``accept``."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_adapter(model: Any, tokenizer: Any, folder: Path, base: str) -> int:
    """A PEFT adapter with the content hash of its base; bytes of the weights."""
    model.peft_config["default"].base_model_name_or_path = base
    embeddings = False if base in models.DEMO_NAMES else "auto"  # else PEFT asks the hub for a base of that name
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=embeddings)
    tokenizer.save_pretrained(folder)
    (folder / "trimtab.json").write_text(json.dumps({"base": base, "base_sha256": base_sha256(model)}, indent=1))
    return (folder / "adapter_model.safetensors").stat().st_size


def write_model(model: Any, tokenizer: Any, folder: Path) -> int:
    """A whole model (adapters already merged); bytes of the weights."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def probe(loaded: LoadedModel) -> Tensor:
    """Logits of a fixed sequence of 24 tokens (1 x 24 x vocabulary, float32, CPU)."""
    model: Any = loaded.model
    keep_order(model)  # repacked 4-bit layers round otherwise
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(24) * 7919 % size).unsqueeze(0).to(loaded.device)
    logits: Tensor = model(input_ids=ids).logits.float().cpu()
    return logits


def reload(folder: Path, expected: Tensor, *, exact: bool, base: str | None = None, **how: Any) -> LoadedModel:
    """Load what was saved and compare its logits with those in memory.

    Args:
        exact: bit for bit (an adapter in float32); otherwise within ``MERGE_TOLERANCE``.
        base: load the adapter on this model name instead of the recorded one.

    Raises:
        TrimtabError: where they differ.
    """
    again = models.load(f"{base}?adapter={folder}" if base else str(folder), **how)
    found = probe(again)
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= (0.0 if exact else MERGE_TOLERANCE * max(scale, 1.0)):
        seen = f"largest logit difference {worst:.3g} (largest logit {scale:.3g})"
        raise TrimtabError("the saved model is not the model that was repaired", seen=seen, fix="report this")
    return again


def card(title: str, what: list[str], table: str, notes: list[str]) -> str:
    """README.md of a patched model: what was done, before and after, what to know."""
    head = "---\nlibrary_name: peft\ntags:\n- trimtab\n- safety\n---\n"
    done = "\n".join(f"- {line}" for line in what)
    more = "\n".join(f"- {line}" for line in notes) or "- none"
    return (
        f"{head}\n# {title}\n\nRepaired with `trimtab patch` {__version__}.\n\n## What was done\n\n{done}\n\n"
        f"## Before and after\n\n{table}\n\n## What to know\n\n{more}\n"
    )


def record(folder: Path, document: dict[str, Any]) -> None:
    """``patch.json`` beside the weights: the settings, every look, the verdict; no prompts and no answers."""
    (folder / RECORD).write_text(json.dumps(document, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return value._asdict()
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
