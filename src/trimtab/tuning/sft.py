"""``trimtab sft``: TRL's supervised fine-tuning, with the guard.

Covered: TRL's own flags and YAML unchanged plus ``GuardArguments``; resume. Not covered: the data
(``training_data.py``), writing the result (``saving.py``), other trainers (use ``SafetyGuardCallback`` with them).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimtab import models
from trimtab.errors import TrimtabError, UsageError
from trimtab.exact_model import require_exact
from trimtab.precision import cpu_has_bfloat16
from trimtab.tuning.options import GuardArguments
from trimtab.tuning.saving import record_base, require_space, save_trained, verify_saved
from trimtab.tuning.training_data import load_data, require_supervised_tokens
from trimtab.tuning.trl_on_cpu import supervised_positions_only


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
        UsageError: for a flag or a YAML key that neither TRL nor trimtab knows, a YAML key that is there twice.
        DataError: for a YAML file that is not text or not YAML.
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
    _check_configuration(argv)
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


def _check_configuration(argv: Sequence[str]) -> None:
    """Of the file that TRL reads, what its reader does not say."""
    from trimtab.flat_yaml import read_flat

    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != "--config" or not (equals or place + 1 < len(argv)):
            continue
        path = Path(value if equals else argv[place + 1])
        if path.exists():  # where there is none, TRL's reader says so: wrong usage, as any other flag's wrong value
            read_flat(path, "the configuration", "model_name_or_path: demo")


def run(argv: Sequence[str]) -> SftResult:
    """Train as ``trl sft`` would, with the guard; see ``parse`` for the options."""
    from trl import SFTTrainer, get_peft_config

    script, training, model_options, mixture, guard = parse(argv)
    if not model_options.model_name_or_path:
        raise UsageError("no model named", fix="pass --model_name_or_path NAME (or `demo`)")
    training.resume_from_checkpoint = _resumed(training)
    if training.deepspeed:
        _warn_of_left_locks()
    require_exact(model_options.model_name_or_path, "sft")
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
        record_base(Path(training.output_dir), loaded.name, base_sha256)
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


def _resumed(training: Any) -> str | bool | None:
    """What to go on from: a folder, or True for the last checkpoint of the output folder.

    Transformers' own field is a word and takes ``true`` for a folder's name.

    Raises:
        UsageError: where there is no checkpoint.
    """
    named = training.resume_from_checkpoint
    if named is None or str(named).lower() == "false":
        return None
    if str(named).lower() != "true":
        if not (Path(named) / "trainer_state.json").is_file():
            raise UsageError("no checkpoint there to go on from", seen=named, fix="name a checkpoint-N folder, or true")
        return str(named)
    if not any(Path(training.output_dir).glob("checkpoint-*")):
        fix = "leave --resume_from_checkpoint out to begin, or check --output_dir"
        raise UsageError("no checkpoint to go on from", seen=training.output_dir, fix=fix)
    return True


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


def _warn_of_left_locks() -> None:
    from trimtab.tuning.zero import left_locks

    for lock in left_locks():
        print(
            f"warning: {lock} is left of a compilation that was cut off, or one still runs; DeepSpeed may wait for it "
            "for ever. If nothing compiles there, delete it",
            file=sys.stderr,
        )


def _suggest(flag: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(flag.lstrip("-").split("=")[0], known, n=3)
    return f"did you mean --{' or --'.join(close)}?" if close else "see `trimtab sft --help-all`"


def _usage_error(message: str) -> Any:
    raise UsageError("the command line cannot be used", seen=message, fix="see `trimtab sft --help`")


if __name__ == "__main__":
    run(sys.argv[1:])
