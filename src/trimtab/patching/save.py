"""A repair on disk: an adapter or a merged model, its card, and the check that what was saved is what was made.

Covered: writing beside and moving into place, the base's content hash, the card. Not covered: whether the repair is
good enough to be saved (``verify.py``).
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab import __version__, models
from trimtab.errors import TrimtabError, UsageError
from trimtab.four_bits import keep_order
from trimtab.model_names import DEMO_NAMES, ModelSpec
from trimtab.models import LoadedModel
from trimtab.patching.adapters import base_sha256

MERGE_TOLERANCE = 1e-4  # largest logit difference in float32, relative to the largest logit
RECORD = "patch.json"


class Scratch:
    """A folder that becomes ``target`` only when everything in it is whole and accepted.

    Raises:
        UsageError: when ``target`` exists and is not an empty folder, or has no name of its own (".", "..", "/").
    """

    def __init__(self, target: Path) -> None:
        if target.name in ("", ".."):
            raise UsageError("the output folder has no name of its own", seen=target, fix="name a new folder")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(
                "the output folder is not empty: nothing is overwritten", seen=target, fix="name a new one"
            )
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = target.parent / f".patch-{secrets.token_hex(6)}"
        self.path.mkdir()  # not mkdtemp: its mode 0700 would stay with the result

    def accept(self) -> None:
        """Move into place."""
        if self.target.is_dir():
            self.target.rmdir()
        self.path.replace(self.target)

    def drop(self) -> None:
        """Remove what was not accepted; harmless after ``accept``."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_adapter(model: Any, tokenizer: Any, folder: Path, base: str) -> int:
    """A PEFT adapter with the content hash of its base; bytes of the weights.

    ``base`` may carry dtype and device: trimtab's own record keeps them, PEFT's configuration only what PEFT reads.
    """
    spec, config = ModelSpec.parse(base), model.peft_config["default"]
    config.base_model_name_or_path, config.revision = spec.location, spec.revision
    embeddings = False if spec.location in DEMO_NAMES else "auto"  # else PEFT asks the hub for a base named so
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


def reload(folder: Path, expected: Tensor, *, exact: bool, made: Any = None, **how: Any) -> LoadedModel:
    """Load what was saved and compare it with what is in memory.

    Args:
        expected: ``probe`` of the model in memory.
        exact: logits bit for bit; otherwise within the rounding of the dtype.
        made: the model in memory: what was written of it must come back bit for bit.
        how: passed to ``models.load``: as the given model was loaded, dtype included.

    Raises:
        TrimtabError: where they differ.
    """
    again = models.load(str(folder), **how)
    if made is not None:
        _require_same_weights(made, again.model)
    require_close(probe(again), expected, 0.0 if exact else tolerance(dtype_of(again.model)))
    return again


def dtype_of(model: Any) -> torch.dtype:
    """In which the model computes: of its first floating-point weight that is not an adapter's."""
    named = model.named_parameters()
    found: torch.dtype = next(p.dtype for name, p in named if p.is_floating_point() and ".lora_" not in name)
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Largest logit difference, relative to the largest logit, that merging an adapter may make in this dtype.

    Half precision rounds every merged weight once more, and small changes vanish: on the demo up to 0.022 in bfloat16
    and 0.015 in float16. The bound is wide: it is to find a wrong merge; how the merged model behaves is verified.
    """
    return MERGE_TOLERANCE if dtype.itemsize >= 4 else 2.0 * math.sqrt(torch.finfo(dtype).eps)


def require_close(found: Tensor, expected: Tensor, share: float) -> None:
    """Raise where logits differ by more than this share of the largest one (0: at all).

    Raises:
        TrimtabError: with the difference.
    """
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= share * max(scale, 1.0):
        _raise_other(f"largest logit difference {worst:.3g} (largest logit {scale:.3g})")


def _require_same_weights(made: Any, again: Any) -> None:
    """All weights of a whole model, those of the adapter where the base is not written."""
    adapter = hasattr(made, "peft_config")
    first, second = (
        {name: value for name, value in model.state_dict().items() if not adapter or ".lora_" in name}
        for model in (made, again)
    )
    if odd := sorted(set(first) ^ set(second)):
        _raise_other(f"{len(odd)} weights are only in one of them, first: {odd[0]}")
    for name, value in first.items():
        if not torch.equal(value.float(), second[name].to(value.device).float()):  # half precision fits into float32
            _raise_other(f"other values in {name}")


def _raise_other(seen: str) -> None:
    raise TrimtabError("the saved model is not the model that was repaired", seen=seen, fix="report this")


def card(title: str, what: list[str], table: str, notes: list[str], *, whole: bool = False) -> str:
    """README.md of a patched model: what was done, before and after, what to know. ``whole``: not an adapter."""
    library = "transformers" if whole else "peft"
    head = f"---\nlibrary_name: {library}\ntags:\n- trimtab\n- safety\n---\n"
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
