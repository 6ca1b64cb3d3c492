"""One way to hold a model: hub id, local folder, GGUF file, PEFT adapter on any of them, and the embedded demo.

Covered: finding the weights, dtype, device, tokenizer, chat template, adapters; refusing pickles and foreign adapters.
Not covered: generation (``generation.py``), what an approximation does (``approximation/``), where the demo's weights
come from (``demo_model.py``).

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
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from trimtab.errors import ModelError, UsageError
from trimtab.json_files import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_NAMES = ("demo", "demo-unaligned")
_QUERY_KEYS = ("revision", "adapter", "dtype", "device", "chat_template", "approx")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model name. ``location`` is everything before the ``?``."""

    location: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None
    chat_template: str | None = None
    approx: str | None = None

    @classmethod
    def parse(cls, name: str, **overrides: str | None) -> ModelSpec:
        """Split ``location?key=value&...``; keyword overrides that are not None win.

        Raises:
            UsageError: for an unknown key.
        """
        location, _, query = name.partition("?")
        parts = [part.partition("=") for part in query.split("&")] if query else []
        options = {key: unquote(value) for key, _, value in parts}
        for key in options:
            if key not in _QUERY_KEYS:
                raise UsageError(
                    f"unknown key in the model name {name!r}", seen=key, fix=f"use one of: {', '.join(_QUERY_KEYS)}"
                )
            if not options[key]:
                raise UsageError(
                    f"a key without a value in the model name {name!r}", seen=key, fix=f"write {key}=VALUE"
                )
        given = {key: value for key, value in overrides.items() if value is not None}
        return replace(cls(location=location), **{**options, **given})


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
        spec = _unfold_adapter_folder(spec)
    device = named_device(spec.device) if spec.device else default_device()
    dtype = resolve_dtype(spec.dtype, device)
    model, tokenizer = _load_base(spec, dtype, dict(from_pretrained or {}))
    if spec.chat_template:
        tokenizer.chat_template = _read_template(spec.chat_template)
    _separate_pad_token(tokenizer)
    if require_chat:
        require_chat_template(tokenizer, name)
    if spec.adapter:
        model = _attach_adapter(model, spec.adapter)
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


def _load_base(
    spec: ModelSpec, dtype: torch.dtype, extra: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if spec.location in DEMO_NAMES:
        from trimtab.demo_model import load_demo

        return load_demo(aligned=spec.location == "demo", dtype=dtype)
    path = Path(spec.location)
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype)
    if path.is_dir():
        _refuse_pickles(path)
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


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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


def _refuse_pickles(folder: Path) -> None:
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


def _adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT wrote about an adapter, read by us first: PEFT's own error for a damaged file speaks of the base."""
    what, fix = "the adapter's configuration cannot be read", "save or download it again"
    return read_object(folder / "adapter_config.json", what, fix, ModelError)


def _require_adapter(folder: Path) -> None:
    fix = "name a folder that `trimtab sft` wrote"
    if not (folder / "adapter_config.json").is_file():
        raise ModelError("that folder holds no adapter (no adapter_config.json)", seen=folder, fix=fix)
    _adapter_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError("that adapter has no weights (no adapter_model.safetensors)", seen=folder, fix=fix)


def _unfold_adapter_folder(spec: ModelSpec) -> ModelSpec:
    """A folder that is itself an adapter: take the base from its configuration."""
    folder = Path(spec.location)
    config = _adapter_config(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        fix = f"name the base yourself: BASE?adapter={folder}"
        raise ModelError("that adapter does not say which base it belongs to", seen=folder, fix=fix)
    if spec.adapter:
        raise UsageError(
            "an adapter on an adapter is not supported", seen=spec, fix="merge the first one: trimtab convert"
        )
    inner = ModelSpec.parse(str(base))
    revision = spec.revision or inner.revision or config.get("revision")  # PEFT's own field: of the base
    return replace(spec, location=inner.location, adapter=str(folder), revision=revision)


def _attach_adapter(model: PreTrainedModel, adapter: str) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = Path(adapter)
    if folder.is_dir():
        _refuse_pickles(folder)
        _require_adapter(folder)
        _check_base(model, folder)
    try:
        wrapped = PeftModel.from_pretrained(model, adapter, use_safetensors=True)
    except SafetensorError as error:
        fix = "save or download it again"
        raise ModelError("the adapter's weights cannot be read", seen=f"{adapter}: {error}", fix=fix) from error
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = "use it with the base that it was trained on (base_model_name_or_path in its adapter_config.json)"
        raise ModelError(f"the adapter {adapter} does not fit this model", seen=reason, fix=fix) from error
    return wrapped


def _check_base(model: PreTrainedModel, folder: Path) -> None:
    """Compare the base's content hash with the one that trimtab wrote beside the adapter, where there is one."""
    record = folder / "trimtab.json"
    if not record.is_file():
        return
    what, fix = "the adapter's record of its base cannot be read", "save or download it again"
    expected = read_object(record, what, fix, ModelError).get("base_sha256")
    if getattr(model, "is_quantized", False):
        return  # its weights are not those of the checkpoint; shapes are still checked
    if expected and (actual := content_hash(model, rounded=True)) != expected:
        raise ModelError(
            f"the adapter {folder} was made for another base: same shapes, other weights",
            seen=f"base sha256 {actual[:16]}, the adapter expects {expected[:16]}",
            fix="name the base that it was trained on",
        )


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
