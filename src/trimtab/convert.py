"""Write any model that can be held as a folder of safetensors: pickles, GGUF files, merged adapters."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

from trimtab import models
from trimtab.errors import ModelError, UsageError
from trimtab.exact_model import require_exact


def convert(source: str, target: Path) -> int:
    """Convert and return the number of bytes written; ``target`` appears only when it is whole.

    Raises:
        UsageError: when ``target`` exists, or ``source`` is a name with an approximation.
        ModelError: when the source cannot be read without running its code.
    """
    require_exact(source, "convert")
    if target.exists():
        raise UsageError("the target exists already", seen=target, fix="name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=target.parent))
    try:
        if (Path(source) / "adapter_model.bin").is_file():
            _rewrite_adapter(Path(source), scratch)
        else:
            model, tokenizer = _read(source)
            model.save_pretrained(scratch, safe_serialization=True)
            tokenizer.save_pretrained(scratch)
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return size


def _read(source: str) -> tuple[Any, Any]:
    folder = Path(source)
    if list(folder.glob("pytorch_model*.bin")) and not list(folder.glob("*.safetensors")):
        return _read_pickle(source)
    try:
        loaded = models.load(source, require_chat=False, device="cpu")
    except ModelError as error:
        if folder.exists() or "no safetensors" not in error.what:
            raise
        return _read_pickle(source)  # a hub id with pickles only
    model: Any = loaded.model
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model), loaded.tokenizer


def _rewrite_adapter(source: Path, target: Path) -> None:
    """A PEFT adapter that was saved as a pickle, tensor by tensor; the base is not needed."""
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(source / "adapter_model.bin", weights_only=True, map_location="cpu")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "adapter_model.safetensors")
    except (pickle.UnpicklingError, RuntimeError, AttributeError, ValueError) as error:
        raise ModelError(
            "PyTorch's restricted loader does not read that adapter",
            seen=str(error)[:300],
            fix="do not open it any other way unless you trust its author: a pickle can run code",
        ) from error
    shutil.copy(source / "adapter_config.json", target / "adapter_config.json")


def _read_pickle(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=False, weights_only=True, trust_remote_code=False
        )
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the restricted unpickler raises many types; all mean "not read"
        reason = " ".join(str(error).split())[:300]
        fix = "do not open it any other way unless you trust its author: a pickle can run code"
        raise ModelError(f"PyTorch's restricted loader does not read {source}", seen=reason, fix=fix) from error
