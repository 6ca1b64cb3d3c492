"""``trimtab sft``: TRL's supervised fine-tuning, with the guard.

Covered: TRL's own flags and YAML unchanged plus ``GuardArguments``; local JSONL with line-numbered errors; resume; a
check that the saved model is the model in memory. Not covered: other trainers (use ``SafetyGuardCallback`` with them).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from trimtab import models
from trimtab.errors import DataError, TrimtabError, UsageError
from trimtab.gradients.sharding import is_sharded
from trimtab.precision import cpu_has_bfloat16
from trimtab.tuning.distributed import saved_difference
from trimtab.tuning.options import NO_GUARD, RULE_OPTIONS, GuardArguments, named_anchors
from trimtab.tuning.trl_on_cpu import supervised_positions_only

__all__ = ["NO_GUARD", "RULE_OPTIONS", "GuardArguments", "SftResult", "named_anchors", "parse", "run"]


@dataclass(frozen=True)
class SftResult:
    """What a run leaves. ``steps`` optimizer steps; ``acted`` of them were changed by the guard."""

    output_dir: str
    steps: int
    train_loss: float
    guard: str
    acted: int
    seconds: float


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """TRL's dataclasses and ours from flags and ``--config FILE``.

    Raises:
        UsageError: for a flag or a YAML key that neither TRL nor trimtab knows, or a YAML file that cannot be read.
    """
    import yaml
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    parser = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, GuardArguments), prog="trimtab sft"
    )
    parser.error = _usage_error
    if models.default_device().type == "cpu":  # a flag or a YAML key still wins
        # Transformers refuses bf16, which is TRL's default, without a GPU unless told that a CPU is meant; and where
        # the processor has no such instructions it is many times slower.
        parser.set_defaults(use_cpu=True, **({} if cpu_has_bfloat16() else {"bf16": False}))
    try:
        *found, remaining = parser.parse_args_and_config(args=list(argv), return_remaining_strings=True)
    except OSError as error:
        raise UsageError("cannot read the configuration file", seen=error.filename, fix="check --config") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError("the configuration cannot be used", seen=" ".join(str(error).split())[:400]) from error
    except PackageNotFoundError as error:  # Transformers asks for what an option needs, and says a whole sentence
        fix = "install it; for --deepspeed: pip install 'trimtab[deepspeed]'"
        raise UsageError("an option needs a package that is not installed", seen=error.name, fix=fix) from error
    if remaining:
        known = {name for kind in parser.dataclass_types for name in kind.__dataclass_fields__}
        raise UsageError("unknown flag or YAML key", seen=remaining[0], fix=_suggest(remaining[0], known))
    return tuple(found)


def run(argv: Sequence[str]) -> SftResult:
    """Train as ``trl sft`` would, with the guard; see ``parse`` for the options."""
    from trl import SFTTrainer, get_peft_config

    script, training, model_options, mixture, guard = parse(argv)
    if not model_options.model_name_or_path:
        raise UsageError("no model named", fix="pass --model_name_or_path NAME (or `demo`)")
    callback, recipe = guard.callback(model_options.model_name_or_path), guard.recipe()
    dataset = load_data(script, mixture, training.eval_strategy != "no")
    loaded = load_model(model_options, training)
    _refuse_finished(training)
    lora = get_peft_config(model_options)
    quantised = getattr(loaded.model, "is_quantized", False)
    base_sha256 = models.content_hash(loaded.model, rounded=True) if lora is not None and not quantised else ""
    given = recipe.data(dataset[script.dataset_train_split], loaded, training.seed)
    trainer = (recipe.trainer() or SFTTrainer)(
        model=loaded.model,
        args=training,
        train_dataset=given,
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=loaded.tokenizer,
        peft_config=lora,
        callbacks=[callback] if callback is not None else [],
    )
    if callback is not None:  # ahead of the reporters, so that trackers see the guard's values
        trainer.callback_handler.callbacks.remove(callback)
        trainer.callback_handler.callbacks.insert(0, callback)
    require_supervised_tokens(trainer, len(given) if hasattr(given, "__len__") else None)
    require_space(Path(training.output_dir), trainer.model)
    recipe.before(trainer, loaded)
    try:
        with supervised_positions_only():
            outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except (SafetensorError, OSError) as error:
        fix = "free space, then repeat with --resume_from_checkpoint true where a checkpoint was written"
        raise TrimtabError("training stopped: a file could not be written", seen=error, fix=fix) from error
    if not math.isfinite(outcome.training_loss):
        raise TrimtabError("training diverged", seen=f"mean loss {outcome.training_loss}", fix="lower --learning_rate")
    recipe.after(trainer, loaded)
    save_trained(trainer, training.output_dir)
    is_main = trainer.accelerator.is_main_process
    if is_main and lora is not None:
        _record_base(Path(training.output_dir), loaded.name, base_sha256)
    if guard.verify_save:
        # without the autocast of training around its forward pass: the saved weights are compared, not its rounding
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        verify_saved(Path(training.output_dir), trained, loaded, is_main)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    acted = callback.guard.counters.acted if callback is not None and callback.guard is not None else 0
    seconds = float(outcome.metrics.get("train_runtime", 0.0))
    steps = int(trainer.state.global_step)
    return SftResult(training.output_dir, steps, float(outcome.training_loss), guard.guard, acted, seconds)


def load_model(options: Any, training: Any) -> models.LoadedModel:
    """The model to train, through ``models.load`` (safetensors only, no remote code); TRL's flags may quantise it."""
    from trl import get_quantization_config

    if training.trust_remote_code:
        raise UsageError(
            "trimtab never runs code from a model repository", seen="trust_remote_code: true", fix="remove it"
        )
    extra: dict[str, Any] = dict(training.model_init_kwargs or {})
    if options.attn_implementation:
        extra["attn_implementation"] = options.attn_implementation
    if (quantization := get_quantization_config(options)) is not None:
        extra["quantization_config"] = quantization
    dtype = str(options.dtype or "float32")  # TRL's default too: small updates vanish in bfloat16 weights
    revision = options.model_revision if options.model_revision != "main" else None
    device = "cpu" if training.use_cpu else None
    return models.load(options.model_name_or_path, revision=revision, dtype=dtype, device=device, from_pretrained=extra)


def load_data(script: Any, mixture: Any, evaluates: bool) -> Any:
    """The data set that the flags name; a local ``.jsonl`` or ``.json`` file is checked line by line first."""
    from datasets import DatasetDict, load_dataset
    from trl import get_dataset

    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError(
            "no data named", fix="pass --dataset_name FILE.jsonl (or a hub id), or `datasets:` in the YAML"
        )
    path = Path(script.dataset_name)
    if path.suffix in (".jsonl", ".json"):
        check_jsonl(path)
        found = DatasetDict(load_dataset("json", data_files={script.dataset_train_split: str(path)}))
        if evaluates and script.dataset_test_split not in found:
            fix = "use eval_strategy: no, or name both files under `datasets:` with test_split_size"
            raise UsageError("a single JSONL file has no evaluation split", seen=script.dataset_test_split, fix=fix)
        return found
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def check_jsonl(path: Path) -> None:
    """Every line is an object in one of TRL's forms: ``messages``, ``prompt`` + ``completion``, or ``text``.

    Raises:
        DataError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read the training data", seen=f"{path}: {error}", fix="check --dataset_name") from error
    if text.lstrip().startswith("["):
        return  # one JSON array: `datasets` reads it
    rows = 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"malformed JSON in {path}, line {number}", seen=line[:120], fix=str(error)) from error
        if not isinstance(row, dict) or not (
            {"messages", "text", "input_ids"} & set(row) or {"prompt", "completion"} <= set(row)
        ):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            fix = 'each row needs "messages", or "prompt" and "completion", or "text"'
            raise DataError(f"a row that cannot be trained on in {path}, line {number}", seen=keys, fix=fix)
        rows += 1
    if rows == 0:
        raise DataError("the training data are empty", seen=path)


def require_supervised_tokens(trainer: Any, rows_given: int | None) -> None:
    """Raise when nothing is left to learn from: TRL drops rows whose labels are all masked or cut off.

    Raises:
        DataError: naming the likely cause.
    """
    dataset = trainer.train_dataset
    if rows_given is None or not hasattr(dataset, "__len__"):
        return  # a stream: its rows are not known yet
    if len(dataset) == 0:
        raise DataError(
            "no supervised token in any row: training would change nothing",
            seen=f"{rows_given} rows given, 0 left after tokenising",
            fix="raise --max_length, or check completion_only_loss / assistant_only_loss against the data's form",
        )
    if len(dataset) < rows_given and not trainer.args.packing:
        lost = rows_given - len(dataset)
        print(f"warning: {lost} of {rows_given} rows have no supervised token and were dropped", file=sys.stderr)


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


def _record_base(folder: Path, base: str, base_sha256: str) -> None:
    """Beside an adapter: which weights it belongs to, so that another base of the same shape is refused."""
    (folder / "trimtab.json").write_text(json.dumps({"base": base, "base_sha256": base_sha256}, indent=1))


def _refuse_finished(training: Any) -> None:
    """A finished run in the output folder is not overwritten unless asked for."""
    folder = Path(training.output_dir)
    done = any((folder / name).is_file() for name in ("adapter_model.safetensors", "model.safetensors"))
    if done and not training.resume_from_checkpoint:
        raise UsageError(
            "the output folder already holds a model",
            seen=folder,
            fix="choose another --output_dir, or remove it first",
        )


def _suggest(flag: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(flag.lstrip("-").split("=")[0], known, n=3)
    return f"did you mean --{' or --'.join(close)}?" if close else "see `trimtab sft --help-all`"


def _usage_error(message: str) -> Any:
    raise UsageError("the command line cannot be used", seen=message, fix="see `trimtab sft --help`")


if __name__ == "__main__":
    run(sys.argv[1:])
