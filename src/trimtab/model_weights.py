"""A base model's weights and tokenizer: from the hub, a folder, a GGUF file or the embedded demo; and their hash.

Covered: safetensors and GGUF only, what is wrong with a folder or a hub id in words, quantisation that Transformers
does not read. Not covered: adapters (``model_adapters.py``), device and chat template (``models.py``).
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ModelError
from trimtab.model_names import DEMO_NAMES, ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


def load_base(
    spec: ModelSpec, dtype: torch.dtype, extra: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a name, without its adapter.

    Args:
        extra: more arguments for Transformers' ``from_pretrained``; hub and folders only.

    Raises:
        ModelError: when they cannot be loaded safely.
    """
    if spec.location in DEMO_NAMES:
        from trimtab.demo_model import load_demo

        return load_demo(aligned=spec.location == "demo", dtype=dtype)
    path = Path(spec.location)
    if path.suffix == ".gguf":
        return from_gguf(path, dtype)
    if path.is_dir():
        refuse_pickles(path)
        _require_model(path)
    elif path.exists() or spec.location.startswith((".", "/", "~")) or spec.location.count("/") > 1:
        raise ModelError("no model folder at that path", seen=spec.location, fix="check the path, or name a hub id")
    return _from_pretrained(spec, dtype, extra)


def _from_pretrained(
    spec: ModelSpec, dtype: torch.dtype, extra: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            spec.location, dtype=dtype, use_safetensors=True, **options, **extra
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _not_loaded(spec.location, error) from error
    except (ImportError, RuntimeError) as error:  # mostly kernels of a quantised checkpoint that are a package apart
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "install what it asks for, or load it on a machine that has it"
        raise ModelError(f"{spec.location} cannot be loaded here", seen=reason, fix=fix) from error
    _require_known_quantization(model, spec.location)
    return model, tokenizer


def _not_loaded(location: str, error: Exception) -> ModelError:
    """What Transformers' error means, by whether the model is a folder here or an id of the hub."""
    text = str(error)
    reason = (text.strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in text or "custom code" in text:
        fix = "trimtab never runs code from a model repository; use a model that Transformers supports natively"
        return ModelError(f"{location} needs its own code to load", seen=reason, fix=fix)
    if Path(location).is_dir():  # its pickles were refused before, so there is nothing to convert
        whole = " ".join(text.split())[:300] or type(error).__name__
        fix = "check that the folder holds config, tokenizer and safetensors, each of them whole"
        return ModelError(f"could not load {location}", seen=whole, fix=fix)
    if "safetensors" in text:
        fix = f"convert it once, with pickle code execution off: trimtab convert {location} OUTPUT_FOLDER"
        return ModelError(f"{location} has no safetensors weights", seen=reason, fix=fix)
    fix = (
        "there is no folder of that name here; as a hub id: check name, revision and network, "
        "and `hf auth login` for gated models"
    )
    return ModelError(f"could not load {location}", seen=reason, fix=fix)


def _require_known_quantization(model: PreTrainedModel, name: str) -> None:
    """Transformers only warns of a method that it does not know, and reads packed weights as if they were plain."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None and not getattr(model, "is_quantized", False):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        fix = "convert it to a format that Transformers reads, such as compressed-tensors, GPTQ, AWQ or bitsandbytes"
        raise ModelError(f"{name} is quantised by a method that Transformers does not read", seen=method, fix=fix)


def from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load and dequantise a GGUF file into an ordinary model that can be trained and saved."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ModelError("no GGUF file at that path", seen=path, fix="check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RuntimeError, struct.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"Transformers cannot read {path.name}", seen=reason, fix="check that the file is whole"
        ) from error
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # otherwise save_pretrained refuses the dequantised weights
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, tokenizer


def refuse_pickles(folder: Path) -> None:
    """Raise where a folder's only weights are pickles.

    Raises:
        ModelError: with the command that converts them.
    """
    if any(folder.glob("*.safetensors")):
        return
    for name in _PICKLES:
        if (folder / name).exists():
            raise ModelError(
                "that checkpoint is a pickle, which can run code when it is opened; trimtab reads safetensors only",
                seen=folder / name,
                fix=f"convert it once, with pickle code execution off: trimtab convert {folder} OUTPUT_FOLDER",
            )


def _require_model(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        fix = "name a folder with config.json, tokenizer and safetensors, or a hub id"
        raise ModelError("that folder holds no model (no config.json, no *.safetensors)", seen=folder, fix=fix)


def content_hash(model: PreTrainedModel, *, rounded: bool = False) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters and persistent buffers (64 hex digits).

    Args:
        rounded: round floating-point tensors to bfloat16 first, so that one checkpoint has one hash whether it was
            loaded in float32 or in bfloat16.
    """
    import torch

    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        if rounded and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(f"{key}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
