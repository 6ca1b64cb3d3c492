"""QuadA: the cosine term by hand, TRL's loss reproduced, noise in training only, data, saving."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tests.tiny import tiny_model
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from trimtab.approximation.apply import active_label, installed
from trimtab.approximation.naming import parse
from trimtab.approximation.sites import base_of, find_sites
from trimtab.approximation.technique import Subject
from trimtab.errors import DataError, UsageError
from trimtab.generation import render
from trimtab.models import LoadedModel
from trimtab.vetting import preferences
from trimtab.vetting.derivatives import trainable_edits
from trimtab.vetting.harden import (
    HardeningTrainer,
    HardenSettings,
    cosine_term,
    harden,
    make_trainer,
    noise_of,
)
from trimtab.vetting.preferences import Preference

ROWS = [
    Preference("build a bomb", "sorry i can't help", "sure here is how to"),
    Preference("bake a cake", "sure here is how", "sorry i can't help", harmful=False),
    Preference("steal the account", "i can't help with that", "yes here is this message"),
    Preference("steal a cake", "sorry i can't", "yes sure"),
] * 2
SETTINGS = HardenSettings("tiny", "noise:up=0.3,down=0.3,layers=0-0", steps=2, batch_size=4, rank=2, cosine=0.0)


def test_the_cosine_term_by_hand() -> None:
    hidden = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    last, harmful = torch.tensor([2, 1, 0, 2]), torch.tensor([True, True, False, True])
    chosen = [hidden[0, 2], hidden[1, 1], hidden[3, 2]]
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    wanted = sum(torch.cosine_similarity(chosen[a], chosen[b], dim=0) for a, b in pairs) / len(pairs)
    found = cosine_term(hidden, last, harmful)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert hidden.grad is not None and hidden.grad[2].count_nonzero() == 0
    assert float(cosine_term(hidden, last, torch.tensor([True, False, False, False])).detach()) == 0.0


def plain_trl(loaded: LoadedModel, out: Path) -> DPOTrainer:
    """DPO as anyone would set it up with TRL on the same rows: nothing of this project in it."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row.prompt}],
            "chosen": [{"role": "assistant", "content": row.chosen}],
            "rejected": [{"role": "assistant", "content": row.rejected}],
        }
        for row in ROWS
    ]
    config = DPOConfig(
        output_dir=str(out),
        max_steps=SETTINGS.steps,
        per_device_train_batch_size=SETTINGS.batch_size,
        beta=SETTINGS.beta,
        max_length=512,
        seed=SETTINGS.seed,
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = LoraConfig(r=SETTINGS.rank, lora_alpha=2 * SETTINGS.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return DPOTrainer(
        model=loaded.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        peft_config=lora,
    )


def first_loss(trainer: DPOTrainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Of its own first batch, with an adapter that changes the model, and that batch."""
    for name, value in trainer.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch)).detach(), batch


def test_without_noise_and_cosine_the_loss_is_trl_s_bit_for_bit(tmp_path: Path) -> None:
    trainer, rows = make_trainer(tiny_model(), ROWS, replace(SETTINGS, noise="none"), tmp_path / "ours")
    ours, batch = first_loss(trainer)
    assert rows.draw == 1 and batch.pop("harmful").tolist().count(False) <= 2
    theirs, plain = first_loss(plain_trl(tiny_model(), tmp_path / "trl"))
    assert batch.keys() == plain.keys() and all(torch.equal(batch[key], plain[key]) for key in plain)
    assert torch.equal(ours, theirs)
    assert abs(float(ours) - math.log(2)) > 1e-3, "an adapter of zeros would make every loss this one"


@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_the_loss_is_dpo_less_the_cosines_of_harmful_prompts(tiny: LoadedModel, tmp_path: Path, weight: float) -> None:
    """Both parts from a forward pass of the noisy policy, by the formula of the module's docstring."""
    trainer, rows = make_trainer(tiny, ROWS[:4], replace(SETTINGS, cosine=weight), tmp_path)
    for name, value in trainer.model.named_parameters():  # an adapter that changes the first layer
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    base = base_of(trainer.model)
    layers = find_sites(base)
    subject = Subject(base, layers, rows, lambda: None)  # type: ignore[arg-type]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with installed(base, layers, trainable_edits(parse(SETTINGS.noise), subject), rows), torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, dict(batch)))
        policy = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
    chances = policy.logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (chances * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    margin = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
    dpo = float(-torch.nn.functional.logsigmoid(SETTINGS.beta * margin).mean())

    harmful, states = {row.prompt: row.harmful for row in ROWS}, []
    rendered = {text: render(tiny, [{"role": "user", "content": text}]) for text in harmful}
    for ids, hidden in zip(batch["input_ids"][:4].tolist(), policy.hidden_states[1][:4], strict=True):
        (text,) = (text for text, prompt in rendered.items() if ids[: len(prompt)] == prompt)
        if harmful[text]:
            states.append(hidden[len(rendered[text]) - 1])  # the token that the reply follows
    assert len(states) == 3
    cosines = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in permutations(states, 2)]
    assert max(cosines) < 0.999
    assert found == pytest.approx(dpo - weight * sum(cosines) / len(cosines), abs=2e-5)


def test_imitation_adds_the_likelihood_of_the_preferred_replies(tiny: LoadedModel, tmp_path: Path) -> None:
    trainer, _ = make_trainer(tiny, ROWS, replace(SETTINGS, noise="none", imitation=0.5), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    ours = float(trainer.compute_loss(trainer.model, dict(batch)))
    plain = {key: value for key, value in batch.items() if key != "harmful"}
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    dpo = float(DPOTrainer._compute_loss(trainer, trainer.model, plain, False))
    half = len(batch["input_ids"]) // 2  # the preferred replies come first
    ids, scored = batch["input_ids"][:half], batch["completion_mask"][:half, 1:].bool()
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"][:half]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert ours - dpo == pytest.approx(0.5 * float(losses[scored].mean()), rel=1e-4)


def test_hardening_trains_under_noise_leaves_none_and_reloads(tiny: LoadedModel, tmp_path: Path) -> None:
    data = tmp_path / "preferences.jsonl"
    data.write_text("\n".join(json.dumps(row.__dict__) for row in ROWS))
    out = tmp_path / "adapter"
    found = harden(replace(SETTINGS, data=str(data), cosine=0.1), out, loaded=tiny)
    assert found.steps == 2 and found.rows == len(ROWS)
    assert (out / "adapter_model.safetensors").is_file() and not list(out.glob("*.bin"))
    assert json.loads((out / "trimtab.json").read_text())["harden"]["noise"] == SETTINGS.noise
    assert active_label(tiny.model) == ""
    with pytest.raises(UsageError, match="finished adapter"):
        harden(replace(SETTINGS, data=str(data)), out, loaded=tiny)


def test_each_step_draws_other_noise(tiny: LoadedModel, tmp_path: Path) -> None:
    trainer, rows = make_trainer(tiny, ROWS, SETTINGS, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    draws = []
    for step in range(2):
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, dict(batch))
        draws.append(rows.draw)
    assert draws == [1, 2]
    assert isinstance(trainer, HardeningTrainer)


@pytest.mark.parametrize("name", ["a4", "teal:0.5,prefill=1", "smoothquant:4", "bolt", "iron", "a8+kv8"])
def test_any_approximation_can_be_trained_against(tiny: LoadedModel, name: str, tmp_path: Path) -> None:
    assert noise_of(name) is None and noise_of("none") is None and noise_of("noise:up=0.1") is not None
    data = tmp_path / "preferences.jsonl"
    data.write_text("\n".join(json.dumps(row.__dict__) for row in ROWS))
    found = harden(replace(SETTINGS, data=str(data), noise=name, imitation=1.0), tmp_path / "adapter", loaded=tiny)
    assert found.steps == 2 and active_label(tiny.model) == ""
    moved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in moved.values())
    assert all(float(value.abs().max()) > 0 for key, value in moved.items() if "lora_B" in key)  # gradients passed


@pytest.mark.parametrize(("name", "fix"), [("teal:0.5", "teal:0.5,prefill=1"), ("a8+teal:0.5", "prefill=1")])
def test_quada_does_not_leave_half_of_a_row_exact(tiny: LoadedModel, name: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one row") as caught:
        harden(replace(SETTINGS, noise=name), tmp_path / "x", loaded=tiny)
    assert fix in str(caught.value)


def test_the_cosine_term_needs_two_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two prompts"):
        harden(replace(SETTINGS, batch_size=1, cosine=0.1), tmp_path / "x")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "chosen": "b"}', "not whole"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "not whole"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "harmful": "yes"}', "true or false"),
        ("{", "malformed"),
    ],
)
def test_bad_preferences_name_the_row(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(DataError) as caught:
        preferences.from_file(path)
    assert words in str(caught.value) and "2" in str(caught.value)


def test_the_bundled_set_prefers_refusals_and_answers_and_holds_no_harm(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab import data

    harmful = {pair.harmful for pair in data.requests("train")}
    monkeypatch.setattr(
        preferences,
        "_own",
        lambda loaded, asked: [
            "I can't help with that." if text in harmful else "Mix flour and eggs." for text in asked
        ],
    )
    two = preferences.bundled(tiny, 20, two_sided=True, seed=0)
    one = preferences.bundled(tiny, 20, two_sided=False, seed=0)
    assert (len(two), len(one)) == (40, 20)
    allowed = {*data.affirmations()}
    assert all(row.rejected in allowed and row.chosen == "I can't help with that." for row in one)
    assert all(row.rejected in data.refusals() for row in two if not row.harmful)
    held_out = {pair.harmful for pair in data.requests("eval")} | {pair.benign for pair in data.requests("eval")}
    assert not held_out & {row.prompt for row in two}
    monkeypatch.setattr(preferences, "_own", lambda loaded, asked: ["Sure, here you are."] * len(asked))
    with pytest.raises(DataError, match="no refusals to harden"):
        preferences.bundled(tiny, 20, two_sided=True, seed=0)
    with pytest.raises(DataError, match="no such number"):
        preferences.bundled(tiny, 10_000, two_sided=True, seed=0)
