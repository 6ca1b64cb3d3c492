"""Gradients through 4-bit layers after a pass without gradient, against finite differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.patching import worlds
from torch import nn

from trimtab.errors import ModelError
from trimtab.four_bits import error_after_a_look, is_four_bit, keep_order
from trimtab.models import LoadedModel, load
from trimtab.patching.adapters import attach
from trimtab.tuning.pools import reader_for

IDS = torch.arange(4, 20).unsqueeze(0)  # 1 x 16


@pytest.fixture
def quantised(tmp_path: Path) -> LoadedModel:
    pytest.importorskip("bitsandbytes", reason="needs trimtab[quantised]")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    made = worlds.aligned(64)  # bitsandbytes repacks blocks of 64
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    return load(str(tmp_path), from_pretrained={"quantization_config": settings})


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.double().pow(2).mean()


def look(model: nn.Module) -> None:
    """What a guard or a repair does between steps; where bitsandbytes repacks."""
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)


def disagreement(model: nn.Module, parameter: nn.Parameter) -> float:
    """|analytic - central difference| / |central difference| of the loss along one direction."""
    parameter.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(model), [parameter])
    way = torch.sign(gradient) * 3e-3
    with torch.no_grad():
        parameter += way
        above = loss_of(model)
        parameter -= 2 * way
        below = loss_of(model)
        parameter += way
    found, expected = float((gradient * way).sum()), float(above - below) / 2
    return abs(found - expected) / abs(expected)


def one_of(model: nn.Module) -> nn.Parameter:
    """A parameter whose gradient passes through all later layers."""
    return next(p for name, p in model.named_parameters() if "layers.0.self_attn.v_proj.lora_B" in name)


def test_gradients_are_right_although_the_model_was_looked_at_before(quantised: LoadedModel) -> None:
    model = get_peft_model(quantised.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    look(model)  # repacked here, where the processor has the instructions
    assert keep_order(model) == 14
    look(model)
    assert disagreement(model, one_of(model)) < 0.02


def test_a_repair_and_a_guard_take_right_gradients(quantised: LoadedModel) -> None:
    look(quantised.model)
    bench = attach(quantised)
    look(bench.model)
    assert disagreement(bench.model, one_of(bench.model)) < 0.02

    look(bench.model)
    reader_for(quantised, bench.model)
    assert disagreement(bench.model, one_of(bench.model)) < 0.02


def test_the_check_sees_a_repacked_layer(quantised: LoadedModel) -> None:
    """Made to repack on any processor: without the instructions both passes are then wrong alike, with them the
    backward pass is."""
    layers: list[Any] = [module for module in quantised.model.modules() if is_four_bit(module)]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    assert error_after_a_look(layers[0]) > 0.2
    assert layers[0].weight.quant_state.packing_format_for_cpu
    keep_order(quantised.model)
    assert max(error_after_a_look(layer) for layer in layers) < 1e-3


def test_a_version_in_which_the_cure_does_nothing_is_refused(quantised: LoadedModel) -> None:
    first = next(module for module in quantised.model.modules() if is_four_bit(module))
    first.register_full_backward_hook(lambda module, into, out: (-into[0],))
    with pytest.raises(ModelError, match=r"(?s)4-bit layers are wrong.*relative error 2\.00.*bitsandbytes"):
        keep_order(quantised.model)


def test_no_gradient_at_all_is_a_wrong_one() -> None:
    """As of a product that has no derivative, which is what a repacked layer may use."""

    class Cut(nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return super().forward(given.detach())

    assert error_after_a_look(Cut(8, 4)) == pytest.approx(1.0)  # its bias lets a gradient through, its input none
    assert error_after_a_look(Cut(8, 4).requires_grad_(False)) == pytest.approx(1.0)


def test_the_check_on_an_ordinary_layer() -> None:
    assert error_after_a_look(nn.Linear(8, 4)) < 1e-6


def test_other_layers_are_left_alone() -> None:
    assert keep_order(worlds.aligned().model) == 0


def test_quada_trains_layers_in_their_first_order(
    quantised: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it trains the model was looked at: for its sites, its answers, and the reference."""
    from trimtab.vetting import harden as hardening

    rows = [{"prompt": f"{verb} the cake today", "chosen": worlds.REFUSAL, "rejected": worlds.ANSWER, "harmful": True}
            for verb in ("steal", "burn")]  # fmt: skip
    data = tmp_path / "preferences.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    found: list[float] = []

    def train(trainer: Any) -> None:
        trainer.model.eval()
        found.append(disagreement(trainer.model, one_of(trainer.model)))
        raise InterruptedError

    monkeypatch.setattr(hardening.HardeningTrainer, "train", train)
    settings = hardening.HardenSettings("quantised", "none", data=str(data), cosine=0.0, batch_size=2)
    with pytest.raises(InterruptedError):
        hardening.harden(settings, tmp_path / "out", loaded=quantised)
    assert found[0] < 0.05
