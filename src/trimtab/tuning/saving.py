"""Writing a trained model without losing it, and checking that what was written is what was trained.

Covered: space on the disk, a rescue folder, full and sharded models, adapters and the base that they belong to.
Not covered: checkpoints during training (Transformers), the guard's own state (``callback.py``).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from trimtab import models
from trimtab.errors import TrimtabError
from trimtab.gradients.sharding import is_sharded
from trimtab.tuning.distributed import saved_difference


def require_space(folder: Path, model: Any) -> None:
    """Raise before training when the result would not fit on the disk.

    Raises:
        TrimtabError: with the sizes.
    """
    is_adapter = hasattr(model, "peft_config")
    saved = [p for p in model.parameters() if p.requires_grad or not is_adapter]
    needed = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        seen = f"{free / 1e6:.1f} MB free at {existing}, the model needs {needed / 1e6:.1f} MB"
        raise TrimtabError(
            "the trained model would not fit on the disk", seen=seen, fix="free space, or --output_dir elsewhere"
        )


def save_trained(trainer: Any, folder: str) -> None:
    """Save; where the disk fills up meanwhile, save into the system's temporary folder instead and say so.

    Every process calls it, and every one hears of a failure: a sharded model is gathered anew for the second attempt.

    Raises:
        TrimtabError: when ``folder`` could not be written; the model is then in the folder that the message names.
    """
    if trainer.is_fsdp_enabled:  # under Accelerate's default for FSDP2, sharded state, `save_model` writes nothing
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    failure = None
    try:
        trainer.save_model(folder)
    except (SafetensorError, OSError) as error:
        failure = error
    if any(gather_object([failure is not None])):
        rescue = tempfile.mkdtemp(prefix="trimtab-rescue-") if trainer.accelerator.is_main_process else folder
        trainer.save_model(rescue)
        fix = f"nothing is lost: the model is in {rescue}; free space and move it"
        raise TrimtabError(f"could not write the trained model to {folder}", seen=failure, fix=fix) from failure


def verify_saved(folder: Path, model: Any, loaded: models.LoadedModel, is_main: bool = True) -> None:
    """Reload the saved model and compare it with the model in memory: its logits on one prompt, or sharded weights.

    Every process calls it. The main one reloads and compares; under FSDP2 the others take part in the gathering.

    Raises:
        TrimtabError: on the main process, when they differ by more than rounding.
    """
    if getattr(loaded.model, "is_quantized", False):
        if is_main:  # reloading needs the quantisation settings; PEFT's own tests cover the adapter
            print("note: the base is quantised, so what was saved is not compared with memory", file=sys.stderr)
        return
    if any(hasattr(parameter, "ds_id") for parameter in loaded.model.parameters()):
        if is_main:  # a model loaded now would be partitioned too, and its forward pass needs every process
            print("note: DeepSpeed has partitioned the model, so what was saved is not compared", file=sys.stderr)
        return
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    if not (is_main or sharded):
        return
    floating = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device, dtype = "cpu" if sharded else str(loaded.model.device), str(floating.dtype).removeprefix("torch.")
    base = loaded.name if (folder / "adapter_config.json").is_file() else None
    name = f"{base}{'&' if '?' in base else '?'}adapter={folder}" if base else str(folder)
    again = models.load(name, device=device, dtype=dtype) if is_main else None
    if sharded:
        apart, tensor = saved_difference(model, again.model if again else None)
        seen = f"largest difference in {tensor}, {apart:.3g} of its largest value"
    elif again:
        apart, scale = _logit_difference(model, again.model, loaded)
        seen = f"largest logit difference {apart:.3g} (largest logit {scale:.3g})"
        apart /= max(scale, 1.0)
    if not apart <= 1e-3:
        fix = f"do not use {folder}; report this with the configuration"
        raise TrimtabError("the saved model is not the model that was trained", seen=seen, fix=fix)


def _logit_difference(model: Any, again: Any, loaded: models.LoadedModel) -> tuple[float, float]:
    """Largest difference between two models' logits on one prompt, and the first one's largest logit."""
    ids = torch.tensor([loaded.tokenizer("The quick brown fox")["input_ids"]], device=loaded.model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        mine, theirs = model(input_ids=ids).logits.float(), again(input_ids=ids).logits.float()
    model.train(was_training)
    return float((mine - theirs).abs().max()), float(mine.abs().max())


def record_base(folder: Path, base: str, base_sha256: str) -> None:
    """Beside an adapter: which weights it belongs to, so that another base of the same shape is refused."""
    (folder / "trimtab.json").write_text(json.dumps({"base": base, "base_sha256": base_sha256}, indent=1))
