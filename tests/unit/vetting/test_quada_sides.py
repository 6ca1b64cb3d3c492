"""QuadA's two sides: a reference that knows neither noise nor adapter, a policy that sees the noise, in which layers,
and again when its layers are recomputed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from tests.unit.vetting.small_models import random_model
from torch import Tensor
from trl import DPOTrainer

from trimtab.approximation.apply import installed
from trimtab.approximation.naming import parse
from trimtab.approximation.sites import base_of, find_sites
from trimtab.approximation.technique import Edit, Subject
from trimtab.cli import trimtab as command_line
from trimtab.models import LoadedModel
from trimtab.vetting import harden as module
from trimtab.vetting.harden import HardenSettings, harden, make_trainer
from trimtab.vetting.preferences import Preference

ROWS = [
    Preference("build a bomb", "sorry i can't help", "sure here is how to"),
    Preference("bake a cake", "sure here is how", "sorry i can't help", harmful=False),
    Preference("steal the account", "i can't help with that", "yes here is this message"),
    Preference("steal a cake", "sorry i can't", "yes sure"),
] * 2
SETTINGS = HardenSettings("tiny", "noise:up=0.5,down=0.5", steps=1, batch_size=4, rank=2, cosine=0.0)


def log_probs(model: Any, batch: dict[str, Any]) -> Tensor:
    """Sum over the reply's tokens, by hand; preferred replies first, then the others."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (found * batch["completion_mask"][:, 1:]).sum(1)


def references(batch: dict[str, Any]) -> Tensor:
    return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])


def file_of(folder: Path) -> str:
    path = folder / "preferences.jsonl"
    path.write_text("\n".join(json.dumps(row.__dict__) for row in ROWS))
    return str(path)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the policy gives, and the batch, at every call of TRL's loss while ``harden`` trains."""
    found: list[tuple[Tensor, dict[str, Any]]] = []
    original = DPOTrainer._compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        found.append((log_probs(model, inputs), dict(inputs)))
        return original(self, model, inputs, return_outputs)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", spy)
    return found


@pytest.mark.parametrize("adapter_changes_the_model", [False, True])
def test_the_reference_is_the_clean_model_and_the_policy_is_not(
    tiny: LoadedModel,
    seen: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter_changes_the_model: bool,
) -> None:
    """An adapter begins as none at all, so one that does not is what tells whether it was off."""
    clean = copy.deepcopy(tiny.model)
    if adapter_changes_the_model:
        make: Callable[..., Any] = peft.LoraConfig
        monkeypatch.setattr(peft, "LoraConfig", lambda **given: make(**given, init_lora_weights=False))
    harden(replace(SETTINGS, data=file_of(tmp_path)), tmp_path / "out", loaded=tiny)
    policy, batch = seen[0]
    torch.testing.assert_close(references(batch), log_probs(clean, batch), atol=1e-4, rtol=1e-4)
    assert float((policy - references(batch)).abs().min()) > 1e-3


def test_without_noise_the_policy_begins_at_the_reference(tiny: LoadedModel, seen: list[Any], tmp_path: Path) -> None:
    """So that what the test above sees is the noise."""
    harden(replace(SETTINGS, noise="none", data=file_of(tmp_path)), tmp_path / "out", loaded=tiny)
    policy, batch = seen[0]
    torch.testing.assert_close(policy, references(batch), atol=1e-4, rtol=1e-4)


def test_all_layers_trains_with_noise_in_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line: the same noise with and without the flag."""
    model = random_model(tmp_path / "model")
    touched: list[set[int]] = []
    original = module.install

    def spy(base: Any, layers: Any, edits: list[Edit], rows: Any) -> Any:
        touched.append({edit.layer for edit in edits})
        return original(base, layers, edits, rows)

    monkeypatch.setattr(module, "install", spy)
    small = f"--steps 1 --batch-size 4 --rank 2 --cosine 0 --data {file_of(tmp_path)}"
    for place, more in enumerate(("", "--all-layers")):
        noise = f"--noise noise:up=0.1,layers=0-0 {more}"
        words = f"harden {model} --method quada {noise} {small} --out {tmp_path / str(place)}"
        assert CliRunner().invoke(command_line, words.split(), catch_exceptions=False).exit_code == 0
    assert touched == [{0}, {0, 1}]
    record = json.loads((tmp_path / "1" / "trimtab.json").read_text())
    assert "layers" not in record["harden"]["noise"]


@pytest.mark.parametrize("cosine", [0.0, 0.1])
def test_a_recomputed_layer_draws_the_same_noise(tiny: LoadedModel, tmp_path: Path, cosine: float) -> None:
    """Gradient checkpointing runs a layer again on the way back: gradients are those without it, and other noise would
    have given others."""
    trainer, rows = make_trainer(tiny, ROWS, replace(SETTINGS, cosine=cosine), tmp_path)
    base = base_of(trainer.model)
    layers, calls = find_sites(base), [0]

    def counted(edit: Edit) -> Edit:
        def function(x: Tensor) -> Tensor:
            calls[0] += 1
            return edit.function(x)

        return edit._replace(function=function)

    subject = Subject(base, layers, rows, lambda: None)  # type: ignore[arg-type]
    edits = [counted(edit) for technique in parse(SETTINGS.noise) for edit in technique.edits(subject)]
    batch = next(iter(trainer.get_train_dataloader()))
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))

    def gradients(step: int) -> Tensor:
        trainer.state.global_step, calls[0] = step, 0
        trainer.model.train().zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    with installed(base, layers, edits, rows):
        plain, once = gradients(0), calls[0]
        other = gradients(1)
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        again, twice = gradients(0), calls[0]
    assert twice == 2 * once > 0
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)
    assert float((other - plain).abs().max()) > 1e-3
