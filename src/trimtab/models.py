"""One way to hold a model: hub id, local folder, GGUF file, PEFT adapter on any of them, and the embedded demo.

Covered: dtype, device, chat template, padding, and the whole of it in order. Not covered: names (``model_names.py``),
weights (``model_weights.py``), adapters (``model_adapters.py``), generation (``generation.py``), what an approximation
does (``approximation/``), where the demo's weights come from (``demo_model.py``).

A model is named by a string, the same in every verb::

    demo                             the embedded aligned model           (demo-unaligned: as published)
    HuggingFaceTB/SmolLM2-135M       a hub id, optionally ?revision=SHA
    runs/my-model                    a folder with safetensors, or a PEFT adapter folder
    model.Q4_1.gguf                  a GGUF file
    demo?adapter=runs/my-adapter     an adapter on any of the above
    demo?approx=teal:0.5             with approximated activations (``trimtab.approximation``)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ModelError, UsageError
from trimtab.model_adapters import attach_adapter, unfold_adapter_folder
from trimtab.model_names import ModelSpec
from trimtab.model_weights import content_hash as content_hash
from trimtab.model_weights import load_base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer. ``name`` is what the user wrote."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.device


def load(
    name: str,
    *,
    require_chat: bool = True,
    from_pretrained: Mapping[str, Any] | None = None,
    **overrides: str | None,
) -> LoadedModel:
    """Load a model for evaluation or training.

    Args:
        name: see the module's docstring.
        require_chat: raise when the tokenizer has no chat template.
        from_pretrained: more arguments for Transformers' ``from_pretrained`` (attention, quantisation); hub and folders
            only.
        **overrides: ``revision``, ``adapter``, ``dtype`` ("float32", "bfloat16", "float16", "auto"), ``device``
            ("cpu", "cuda", "cuda:1", ...), ``chat_template`` (path of a Jinja file), ``approx`` (e.g. "teal:0.5").

    Raises:
        ModelError: when it cannot be loaded safely; the message says what to do.
        UsageError: an unknown key or one without a value in the name, an unknown dtype or approximation, an adapter on
            an adapter.
        ApproximationError: the approximation does not fit the model.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_flush_denormal(True)  # AdamW's decaying moments become denormal and slow CPU training many times over
    spec = ModelSpec.parse(name, **overrides)
    if spec.approx:
        from trimtab.approximation import naming

        naming.parse(spec.approx)  # a typo should not cost a model load
    if (Path(spec.location) / "adapter_config.json").is_file():
        spec = unfold_adapter_folder(spec)
    device = named_device(spec.device) if spec.device else default_device()
    dtype = resolve_dtype(spec.dtype, device)
    model, tokenizer = load_base(spec, dtype, dict(from_pretrained or {}))
    if spec.chat_template:
        tokenizer.chat_template = _read_template(spec.chat_template)
    _separate_pad_token(tokenizer)
    if require_chat:
        require_chat_template(tokenizer, name)
    if spec.adapter:
        model = attach_adapter(model, spec.adapter)
    if not getattr(model, "is_quantized", False):  # a quantised model was placed by its loader and cannot be moved
        model = model.to(device)  # type: ignore[arg-type]
    model.eval()
    loaded = LoadedModel(model=model, tokenizer=tokenizer, name=name)
    if spec.approx:
        from trimtab.approximation.apply import attach

        attach(loaded, spec.approx)
    return loaded


def default_device() -> torch.device:
    """The best device present: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def named_device(name: str) -> torch.device:
    """The device of that name, checked before anything is loaded: PyTorch only asserts once weights are moved.

    Raises:
        UsageError: for a name that PyTorch does not know.
        ModelError: for a device that is not there.
    """
    import torch

    try:
        device = torch.device(name)
        backend = torch.get_device_module(device)
    except RuntimeError as error:
        raise UsageError("unknown device", seen=name, fix="use one of: cpu, cuda, cuda:N, mps") from error
    kind = device.type.upper()
    if not backend.is_available():
        fix = f"leave device out, or install {'an' if kind == 'MPS' else 'a'} {kind} build of PyTorch"
        raise ModelError(f"this PyTorch sees no {kind} device", seen=name, fix=fix)
    if (device.index or 0) >= backend.device_count():
        fix = f"give a number below {backend.device_count()}, or none"
        raise ModelError(f"this PyTorch sees no {kind} device of that number", seen=name, fix=fix)
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """float32 on a CPU (half precision is slower there), bfloat16 on an accelerator that has it, else float16."""
    import torch

    if name in (None, "auto"):
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError("unknown dtype", seen=name, fix="use one of: auto, float32, bfloat16, float16")
    return dtype  # type: ignore[no-any-return]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise unless the tokenizer can render a chat."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {name!r} has no chat template, and a safety measurement without one means nothing",
            fix="pass --chat-template FILE.jinja (the template that the model was trained with), "
            "or name the instruct version of the model",
        )


def fingerprint(loaded: LoadedModel) -> dict[str, str]:
    """What must agree for two measurements to be comparable, as short content hashes (16 hex digits each)."""
    tokenizer = loaded.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    generation = loaded.model.generation_config.to_diff_dict() if loaded.model.generation_config else {}
    generation.pop("transformers_version", None)
    approximation = getattr(loaded.model, "_trimtab_approximation", None)
    return {
        "weights": content_hash(loaded.model)[:16],
        "tokenizer": _short_hash(vocabulary),
        "chat_template": _short_hash(str(tokenizer.chat_template)),
        "generation": json.dumps(generation, sort_keys=True, default=str),
        **({"approximation": approximation} if approximation else {}),
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "give the path of a Jinja file in UTF-8"
        raise ModelError("cannot read the chat template", seen=f"{path}: {error}", fix=fix) from error


def _separate_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give padding its own token: where it equals the end of turn, collators mask the end of turn out of the loss."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    for token in _PAD_CANDIDATES:
        if token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
