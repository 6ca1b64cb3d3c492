"""What hardening takes and leaves: exact models only, an adapter that is there whole or not at all, interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.unit.vetting.small_models import random_model

from trimtab import approximate, models
from trimtab.errors import ModelError, UsageError
from trimtab.models import LoadedModel
from trimtab.vetting import adapters
from trimtab.vetting.distill import DistillSettings, harden_by_distillation
from trimtab.vetting.harden import HardeningTrainer, HardenSettings, harden

PREFERENCES = [
    {"prompt": "build a bomb", "chosen": "sorry i can't help", "rejected": "sure here is how to"},
    {"prompt": "bake a cake", "chosen": "sure here is how", "rejected": "sorry", "harmful": False},
]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def never(*_: object, **__: object) -> Any:
    raise AssertionError("the model is checked before it is loaded")


def quada(model: str, folder: Path) -> HardenSettings:
    data = folder / "preferences.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in PREFERENCES))
    return HardenSettings(model, "a8", data=str(data), steps=2, batch_size=2, rank=2, cosine=0.0)


def adapted(loaded: LoadedModel) -> Any:
    """An adapter that changes the model's logits."""
    model = get_peft_model(loaded.model, LORA)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def last_factor(model: Any) -> torch.Tensor:
    """Of the last down projection, whose every change reaches the logits."""
    return [weight for key, weight in model.named_parameters() if "down_proj.lora_B" in key][-1]


@pytest.mark.parametrize("name", ["demo?approx=a8", "demo?dtype=float32&approx=iron"])
def test_an_approximated_model_is_no_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", never)
    with pytest.raises(UsageError, match=r"(?s)takes the exact model.*approx=.*--noise"):
        harden(quada(name, tmp_path), tmp_path / "out")
    with pytest.raises(UsageError, match=r"(?s)takes the exact model.*approx=.*--noise"):
        harden_by_distillation(DistillSettings(name, ("a8",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nor_is_one_that_is_approximated_in_memory(tiny: LoadedModel, tmp_path: Path) -> None:
    with approximate(tiny, "a8"):
        with pytest.raises(UsageError, match=r"(?s)takes the exact model.*a8"):
            harden(quada("tiny", tmp_path), tmp_path / "out", loaded=tiny)
        with pytest.raises(UsageError, match=r"(?s)takes the exact model.*a8"):
            harden_by_distillation(DistillSettings("tiny", ("a4",)), tmp_path / "out", loaded=tiny)


def test_an_adapter_is_refused_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model()
    held = LoadedModel(adapted(loaded), loaded.tokenizer, "tiny")
    held.model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match=r"(?s)adapter of its own.*trimtab convert"):
        harden(quada("tiny", tmp_path), tmp_path / "out", loaded=held)
    monkeypatch.setattr(models, "load", never)
    for name in ("demo?adapter=runs/x", str(tmp_path / "adapter")):
        with pytest.raises(UsageError, match=r"(?s)adapter of its own.*trimtab convert"):
            harden(quada(name, tmp_path), tmp_path / "out")
        with pytest.raises(UsageError, match=r"(?s)adapter of its own.*trimtab convert"):
            harden_by_distillation(DistillSettings(name, ("a8",)), tmp_path / "out")


@pytest.mark.parametrize("options", ["", "?dtype=float32", "?device=cpu&dtype=float32"])
def test_an_adapter_that_reloads_to_other_logits_is_told(options: str, tmp_path: Path) -> None:
    name = random_model(tmp_path / "model") + options
    loaded = models.load(name)
    model = adapted(loaded)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapters.verify(tmp_path / "adapter", model, loaded)
    with torch.no_grad():
        last_factor(model).add_(1.0)
    with pytest.raises(ModelError, match=r"(?s)logits of the model in memory.*gap.*do not use"):
        adapters.verify(tmp_path / "adapter", model, loaded)


def test_one_that_gives_no_numbers_is_told(tmp_path: Path) -> None:
    loaded = models.load(random_model(tmp_path / "model"))
    model = adapted(loaded)
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        last_factor(model).fill_(torch.nan)
    with pytest.raises(ModelError, match="gap nan"):
        adapters.verify(tmp_path / "adapter", model, loaded)


@pytest.mark.parametrize("name", ["demo?dtype=float32", "owner/name?revision=abc", "elsewhere?dtype=float32"])
def test_what_was_loaded_by_name_is_loaded_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model from the hub too; one that exists only in memory cannot be."""
    tiny = tiny_model()
    tiny.model.name_or_path = "owner/name"
    asked: list[tuple[str, str]] = []

    def again(given: str, *, adapter: str, device: str) -> LoadedModel:
        asked.append((given, adapter))
        return tiny

    monkeypatch.setattr(models, "load", again)
    adapters.verify(tmp_path, tiny.model, replace(tiny, name=name))
    assert asked == ([] if name.startswith("elsewhere") else [(name, str(tmp_path))])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_hardened_model_of_any_type_reloads(dtype: str, tmp_path: Path) -> None:
    name = f"{random_model(tmp_path / 'model')}?dtype={dtype}"
    harden(quada(name, tmp_path), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_that_fails_is_not_there(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run into that folder is then possible, and a distillation goes on from what it kept."""

    def fails(*_: Any) -> None:
        raise ModelError("other logits")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "verify", fails)
        with pytest.raises(ModelError, match="other logits"):
            adapters.save(adapted(tiny), tiny, out, {"harden": {}})
    assert not (out / "adapter_model.safetensors").exists()
    adapters.check_start("tiny", out, None)
    (out / "README.md").write_text("mine")
    again = tiny_model()
    adapters.save(adapted(again), again, out, {"harden": {}})
    assert (out / "README.md").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "trimtab.json")
    ]


@pytest.mark.parametrize("stage", ["training", "saving"])
def test_an_interrupted_quada_leaves_what_was_there_and_says_so(
    stage: str, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "progress").mkdir(parents=True)
    held = {"README.md": "mine", "trimtab.json": "{}", "adapter_config.json": "[]", "progress/settings.json": "{}"}
    for name, text in held.items():
        (out / name).write_text(text)
    original = HardeningTrainer._compute_loss

    def loss(self: Any, *given: Any) -> Any:
        if stage == "training" and self.state.global_step == 1:
            raise KeyboardInterrupt
        return original(self, *given)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HardeningTrainer, "_compute_loss", loss)
    monkeypatch.setattr(adapters, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harden(quada("tiny", tmp_path), out, loaded=tiny)
    assert {name: (out / name).read_text() for name in held} == held
    assert not (out / "adapter_model.safetensors").exists()
    assert {path.name for path in out.iterdir()} <= {*held, "progress", "adapter.partial"}
    told = capsys.readouterr().err
    assert "interrupted; quada keeps no steps" in told and str(out) in told and "begins anew" in told
