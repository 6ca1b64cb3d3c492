"""``trimtab sft`` end to end on a tiny saved model: TRL's YAML, resume, saved state, and every way to get it wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.tiny import tiny_model

from trimtab import models
from trimtab.anchors import SafetyAnchors
from trimtab.errors import DataError, GuardError, ModelError, TrimtabError, UsageError
from trimtab.tuning import saving, sft
from trimtab.tuning.options import GuardArguments
from trimtab.tuning.training_data import check_jsonl

ANCHOR_ROWS = [
    {"request": "make a bomb", "side": "refuse", "reply": "sorry i can't help with that"},
    {"request": "steal the cake", "side": "refuse", "reply": "sorry i can't help"},
    {"request": "bake a cake", "side": "answer", "reply": "sure here is how to bake"},
    {"request": "weather today", "side": "answer", "reply": "nice today"},
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny model, training rows and anchors."""
    loaded = tiny_model()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"route this {w}"}],
            "completion": [{"role": "assistant", "content": "billing"}],
        }
        for w in ("message", "cake", "day", "base", "weather", "account", "product", "delivery")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANCHOR_ROWS))
    return tmp_path


def _config(place: Path, name: str, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "train.jsonl"),
        "output_dir": str(place / name),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "max_length": 64,
        "bf16": False,
        "guard_anchors": str(place / "anchors.jsonl"),
        "disable_tqdm": True,
    }
    values.update(changes)
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return ["--config", str(path)]


def test_full_fine_tuning_guarded_saved_and_verified(place: Path) -> None:
    result = sft.run(_config(place, "out"))
    assert result.steps == 6 and result.guard == "keel"
    log = [json.loads(line) for line in (place / "out" / "guard.jsonl").read_text().splitlines()]
    steps = [row for row in log if "event" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {"anchor_loss/refuse", "excess/answer", "conflict", "removed"} <= set(steps[0])
    assert result.acted == sum(bool(row["acted"]) for row in steps)
    models.load(str(place / "out"))
    used = SafetyAnchors.from_jsonl(place / "out" / "guard_anchors.jsonl").anchors
    assert {anchor.side for anchor in used} == {"refuse", "answer"} and all(anchor.reply for anchor in used)
    again = sft.run(_config(place, "again", guard_anchors=str(place / "out" / "guard_anchors.jsonl")))
    assert again.acted == result.acted


def test_lora_adapter_records_its_base_and_refuses_another(place: Path) -> None:
    sft.run(_config(place, "lora", use_peft=True, lora_r=4, lora_target_modules="all-linear"))
    record = json.loads((place / "lora" / "trimtab.json").read_text())
    assert record["base"] == str(place / "model") and len(record["base_sha256"]) == 64
    loaded = models.load(str(place / "lora"))
    assert "lora" in str(type(loaded.model)).lower() or hasattr(loaded.model, "peft_config")
    other = tiny_model(seed=1)
    other.model.save_pretrained(place / "other")
    other.tokenizer.save_pretrained(place / "other")
    with pytest.raises(ModelError, match="another base"):
        models.load(f"{place / 'other'}?adapter={place / 'lora'}")


def test_guard_none_is_plain_trl(place: Path) -> None:
    result = sft.run(_config(place, "plain", guard="none", guard_anchors=None))
    assert result.guard == "none" and result.acted == 0 and not (place / "plain" / "guard.jsonl").exists()


def test_published_rule_runs(place: Path) -> None:
    result = sft.run(_config(place, "spf", guard="spf", guard_rank=4))
    assert result.guard == "spf" and result.steps == 6


@pytest.mark.parametrize(("target", "named"), [("decision", ""), ("words", "true"), ("distribution", "")])
def test_interrupted_and_resumed_equals_uninterrupted(place: Path, target: str, named: str) -> None:
    """From a folder, or (``true``) from the last checkpoint there is."""
    sft.run(_config(place, "whole", save_strategy="steps", save_steps=3, guard_target=target))
    checkpoint = place / "whole" / "checkpoint-3"
    assert (checkpoint / "trimtab_guard.safetensors").is_file()
    (place / "half").mkdir()
    shutil.copytree(checkpoint, place / "half" / "checkpoint-3")
    resumed = named or str(place / "half" / "checkpoint-3")
    sft.run(_config(place, "half", resume_from_checkpoint=resumed, guard_target=target))
    whole, half = (load_file(place / name / "model.safetensors") for name in ("whole", "half"))
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("named", "seen"), [("true", "new"), ("new/checkpoint-50", "checkpoint-50")])
def test_a_checkpoint_that_is_not_there_is_named_before_a_model_is_loaded(
    place: Path, named: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"no checkpoint.*to go on from") as caught:
        sft.run(_config(place, "new", resume_from_checkpoint=named))
    assert seen in str(caught.value) and not (place / "new").exists()


def test_a_checkpoint_without_guard_state_is_refused(place: Path) -> None:
    sft.run(_config(place, "whole", save_strategy="steps", save_steps=3, guard="none", guard_anchors=None))
    checkpoint = place / "whole" / "checkpoint-3"
    with pytest.raises(GuardError, match="no guard state"):
        sft.run(_config(place, "half", resume_from_checkpoint=str(checkpoint)))


def test_damaged_guard_state_is_refused(place: Path) -> None:
    sft.run(_config(place, "whole", save_strategy="steps", save_steps=3))
    checkpoint = place / "whole" / "checkpoint-3"
    damaged = bytearray((checkpoint / "trimtab_guard.safetensors").read_bytes())
    damaged[-1] ^= 1
    (checkpoint / "trimtab_guard.safetensors").write_bytes(bytes(damaged))
    with pytest.raises(GuardError, match="damaged"):
        sft.run(_config(place, "half", resume_from_checkpoint=str(checkpoint)))


def test_a_quantised_base_is_guarded_through_its_adapter(place: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs trimtab[quantised]")
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "guard_margin": 0.001}
    asked = _config(place, "qlora", use_peft=True, lora_r=4, lora_target_modules="all-linear", **four_bits)
    result = sft.run(asked)
    assert result.guard == "keel" and result.acted > 0
    saved = load_file(place / "qlora" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("in_hardware", [True, False])
def test_without_a_gpu_the_precision_is_what_the_processor_is_good_at(
    place: Path, monkeypatch: pytest.MonkeyPatch, in_hardware: bool
) -> None:
    monkeypatch.setattr(sft, "cpu_has_bfloat16", lambda: in_hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = _config(place, "out", bf16=None, use_cpu=None, max_steps=1)
    _, training, *_ = sft.parse(asked)
    assert (training.use_cpu, training.bf16) == (True, in_hardware)
    assert sft.run(asked).steps == 1


def test_a_finished_output_folder_is_not_overwritten(place: Path) -> None:
    sft.run(_config(place, "out", guard="none", guard_anchors=None, max_steps=1))
    with pytest.raises(UsageError, match="already holds a model"):
        sft.run(_config(place, "out", guard="none", guard_anchors=None, max_steps=1))


def test_a_model_that_would_not_fit_is_refused_before_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(TrimtabError, match="would not fit"):
        sft.run(_config(place, "out"))


def test_a_disk_that_fills_up_while_saving_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer

    whole = SFTTrainer.save_model

    def save(self: SFTTrainer, output_dir: str, **options: object) -> None:
        if output_dir == str(place / "out"):
            raise OSError(28, "No space left on device")
        whole(self, output_dir, **options)

    monkeypatch.setattr(SFTTrainer, "save_model", save)
    monkeypatch.setattr(saving.tempfile, "mkdtemp", lambda prefix: str(place / "rescue"))
    with pytest.raises(TrimtabError, match="nothing is lost"):
        sft.run(_config(place, "out"))
    models.load(str(place / "rescue"))


def test_zero_supervised_tokens_is_an_error(place: Path) -> None:
    with pytest.raises(DataError, match="no supervised token"):
        sft.run(_config(place, "out", max_length=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaurd": "keel"}, "gaurd"),
        ({"guard": "kiel"}, "unknown guard"),
        ({"guard": "keel", "guard_rank": 3}, "no option --guard_rank"),
        ({"trust_remote_code": True}, "never runs code"),
        ({"dataset_name": None}, "no data named"),
        ({"model_name_or_path": None}, "no model named"),
    ],
)
def test_wrong_configuration_is_named(place: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sft.run(_config(place, "out", **change))
    assert not (place / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guard_rows": -1}, "keel's rows is at least 1"),
        ({"guard_target": "nope"}, "no such target"),
        ({"guard": "spf", "guard_rank": 0}, "spf's rank is at least 1"),
        ({"guard": "spf", "guard_refresh_every": 0}, "spf's refresh_every"),
    ],
)
def test_an_option_that_the_rule_cannot_take_is_named_before_a_model_is_loaded(
    place: Path, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=message):
        sft.run(_config(place, "out", **change))
    assert not (place / "out").exists()


def test_unknown_flags_suggest_the_known_one() -> None:
    with pytest.raises(UsageError, match="did you mean --guard_rank"):
        sft.parse(["--guard_rnk", "3"])
    with pytest.raises(UsageError, match="configuration file"):
        sft.parse(["--config", "nowhere.yaml"])


def test_jsonl_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(DataError, match="line 2") as caught:
        check_jsonl(path)
    assert "Expecting value" in str(caught.value.seen) and caught.value.fix == "write one JSON object a line"
    path.write_text('{"text": "a line separator\u2028inside"}\n', encoding="utf-8")  # JSON allows it unescaped
    check_jsonl(path)
    path.write_text('{"text": "fine"}\n\n{"question": "x"}\n')
    with pytest.raises(DataError, match="line 3"):
        check_jsonl(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        check_jsonl(path)
    with pytest.raises(DataError, match="cannot read"):
        check_jsonl(tmp_path / "absent.jsonl")


def test_guard_options_go_only_to_the_rule_that_has_them() -> None:
    assert GuardArguments(guard="spf", guard_rank=5).options() == {"rank": 5}
    assert GuardArguments(guard="none").callback("m") is None


def test_a_package_that_an_option_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers says it of `--deepspeed` where the extra is not installed."""
    import importlib.metadata

    own = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return own(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--deepspeed", "zero.json"]
    with pytest.raises(UsageError, match=r"trimtab\[deepspeed\]"):
        sft.parse(flags)


def test_a_lock_left_by_a_compilation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch would wait for it without end. One that is held now is no fault."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, held = tmp_path / "left" / "lock", tmp_path / "held" / "lock"
    for lock in (left, held):
        lock.parent.mkdir()
        lock.touch()
    os.utime(left, (0, 0))
    recipe = Path(__file__).parents[3] / "recipes" / "deepspeed" / "zero2.json"
    flags = ["--model_name_or_path", "demo?approx=a8", "--dataset_name", "d", "--output_dir", str(tmp_path / "new")]
    with pytest.raises(UsageError, match="takes the exact model"):  # the run goes no further
        sft.run([*flags, "--deepspeed", str(recipe)])
    said = capsys.readouterr().err
    assert str(left) in said and "delete it" in said and str(held) not in said
