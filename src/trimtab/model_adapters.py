"""Adapters of PEFT on a base model: found, checked against the base they were made for, and put on.

Covered: folders that are adapters themselves, damaged papers, the content hash of the base that trimtab writes beside
an adapter. Not covered: adapters of a hub id are checked by PEFT alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ModelError, UsageError
from trimtab.json_files import read_object
from trimtab.model_names import ModelSpec
from trimtab.model_weights import content_hash, refuse_pickles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def unfold_adapter_folder(spec: ModelSpec) -> ModelSpec:
    """A folder that is itself an adapter: take the base from its configuration.

    Raises:
        ModelError: where it names none. UsageError: an adapter on an adapter.
    """
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


def attach_adapter(model: PreTrainedModel, adapter: str) -> Any:
    """The model with an adapter (folder or hub id) on it.

    Raises:
        ModelError: an adapter that is damaged, of another base, or a pickle.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = Path(adapter)
    if folder.is_dir():
        refuse_pickles(folder)
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
