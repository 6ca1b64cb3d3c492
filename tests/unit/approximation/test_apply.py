"""Approximations on whole models: no trace, composition, adapters, batching, shared prefixes, compile, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.approximation.families import FAMILIES, SIZES, family, token_rows

from trimtab import approximate, prefix
from trimtab.approximation.apply import active_label
from trimtab.approximation.sites import activation_kind, find_sites
from trimtab.errors import ApproximationError, ModelError, UsageError
from trimtab.generation import GenerationSettings, generate
from trimtab.model_names import ModelSpec
from trimtab.models import LoadedModel, fingerprint

IDS = torch.tensor(token_rows(3, 12))
CALIBRATION = token_rows(6, 16, seed=1)
NAMES = ["a8", "teal:0.5", "bolt", "smoothquant:4", "kv4", "noise:up=0.1,down=0.1", "cats:0.5", "omniquant:4,steps=2"]


def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_sites_and_no_trace_is_left(name: str) -> None:
    model = family(name)
    layers = find_sites(model)
    assert len(layers) == 2
    assert activation_kind(layers[0].activation) == ("gelu_tanh" if name.startswith("gemma") else "silu")
    assert layers[0].experts == (name == "mixtral")
    before, attention = logits(model), model.config._attn_implementation
    for approximation in (*NAMES, "nexus+a8+kv8"):
        with approximate(model, approximation, calibration_rows=CALIBRATION):
            changed = logits(model)
        assert not torch.equal(changed, before), approximation
        assert torch.isfinite(changed).all()
        assert torch.equal(logits(model), before), approximation
    assert model.config._attn_implementation == attention
    assert active_label(model) == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_equals_reading_whole_rows(name: str) -> None:
    model = family(name)
    with approximate(model, "a8+kv8"), torch.no_grad():
        new = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, eos_token_id=-1
        )
        again = IDS
        for _ in range(4):
            again = torch.cat(
                [again, model(input_ids=again, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1
            )
    width = min(new.shape[1], again.shape[1])
    assert torch.equal(new[:, :width], again[:, :width])


def test_an_exact_function_changes_nothing() -> None:
    model = family("llama")
    before = logits(model)
    with approximate(model, "smoothquant:16", calibration_rows=CALIBRATION):
        torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "approximation", ["a6", "noise:up=0.2,down=0.2", "teal:0.5", "teal:0.5,prefill=1", "bolt", "kv4"]
)
def test_padding_and_company_do_not_matter(approximation: str) -> None:
    model = family("llama")
    short = IDS[:1, :7]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)
    batch, mask = torch.cat([padded, IDS[1:]]), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with approximate(model, approximation, calibration_rows=CALIBRATION):
        alone = logits(model, short)[0, -1]
        among = logits(model, batch, attention_mask=mask, position_ids=positions)[0, -1]
    # Rounding is a step function, so an ulp of padding can flip one step; a wrong token or position changes far more.
    assert float((alone - among).abs().max()) < 2e-3


@pytest.mark.parametrize("approximation", ["a8", "noise:up=0.2,down=0.2", "teal:0.5,prefill=1", "bolt+kv8"])
def test_a_shared_prefix_read_once_is_the_same(approximation: str) -> None:
    model = family("llama")
    rows = [[5, 6, 7, 8, 9, *tail] for tail in ([10, 11], [12, 13, 14])]
    shared = prefix.shared_length(rows)
    assert shared == 5
    with approximate(model, approximation, calibration_rows=CALIBRATION), torch.no_grad():
        assert prefix.supports(model)
        once = prefix.read(model, prefix.collate(rows, 0, shared)).logits[1, -1]
        whole = model(input_ids=torch.tensor([rows[1]])).logits[0, -1]
    assert float((once - whole).abs().max()) < 2e-3


def test_teal_as_published_needs_whole_rows() -> None:
    model = family("llama")
    with approximate(model, "teal:0.5", calibration_rows=CALIBRATION):
        assert not prefix.supports(model)
    assert prefix.supports(model)


def test_an_adapter_sees_the_approximated_input() -> None:
    model = family("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    before = logits(wrapped)
    with approximate(wrapped, "a4"):
        adapted = logits(wrapped)
        assert active_label(wrapped) == "a4"
        with wrapped.disable_adapter():
            bare = logits(wrapped)
    assert torch.equal(logits(wrapped), before)
    merged = wrapped.merge_and_unload()
    with approximate(merged, "a4"):
        gap = float((logits(merged) - adapted).abs().mean())
    assert gap < 0.1 * float((bare - adapted).abs().mean())  # a flipped rounding step here and there


def test_compiled_models() -> None:
    model = family("llama")
    with approximate(model, "a8"):
        eager = logits(model)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits(compiled), eager)


def test_noise_does_not_depend_on_the_batch_and_has_the_size_asked_for() -> None:
    model = family("llama")
    with approximate(model, "noise:up=0.1,seed=1"):
        first, second = logits(model), logits(model)
        assert torch.equal(first, second)
        torch.testing.assert_close(logits(model, IDS[1:2])[0], first[1], atol=1e-5, rtol=1e-5)
    with approximate(model, "noise:up=0.1,seed=2"):
        assert not torch.equal(logits(model), first)
    with approximate(model, "noise:up=0.1,seed=1,layers=1-1"):
        assert not torch.equal(logits(model), first)


def test_our_generation_works(tiny: LoadedModel) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("bake a cake", "route this message please")]
    plain = generate(tiny, chats, GenerationSettings(max_new_tokens=4))
    with approximate(tiny, "a8+kv8"):
        together = generate(tiny, chats, GenerationSettings(max_new_tokens=4))
        alone = [generate(tiny, [chat], GenerationSettings(max_new_tokens=4))[0] for chat in chats]
    assert [one.text for one in together] == [one.text for one in alone]
    assert generate(tiny, chats, GenerationSettings(max_new_tokens=4)) == plain


def test_the_fingerprint_names_the_approximation(tiny: LoadedModel) -> None:
    assert "approximation" not in fingerprint(tiny)
    with approximate(tiny, "a8"):
        assert fingerprint(tiny)["approximation"] == "a8"
    assert ModelSpec.parse("demo?approx=noise:up=0.1,layers=0-3").approx == "noise:up=0.1,layers=0-3"


def test_a_polynomial_outside_its_range_is_named() -> None:
    model = family("gemma2")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(400)
    with approximate(model, "nexus:clamp=no"), pytest.raises(ApproximationError) as caught:
        logits(model)
    text = str(caught.value)
    assert "layer 1" in text and "±5" in text and "%" in text and "not finite" in text
    with approximate(model, "nexus") as active:
        assert torch.isfinite(logits(model)).all()
        assert active.out_of_range()[1][0] > 0.05


def test_two_at_once_and_ranges_without_layers_are_refused() -> None:
    model = family("llama")
    with approximate(model, "a8"):
        with pytest.raises(UsageError, match="already"), approximate(model, "a4"):
            pass
        assert active_label(model) == "a8"
    with pytest.raises(UsageError, match="no layer"), approximate(model, "a8:layers=7-9"):
        pass
    with pytest.raises(UsageError, match="softmax"), approximate(model, "bolt+iron"):
        pass


def test_a_model_without_the_sites_is_refused_with_what_was_looked_for() -> None:
    import transformers

    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    with pytest.raises(ModelError, match="looked for one attention block"), approximate(model, "a8"):
        pass
    config = transformers.LlamaConfig(**{**SIZES, "hidden_act": "relu"})
    relu = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(ApproximationError, match="approximates no such activation"), approximate(relu, "bolt"):
        pass


def test_calibration_without_a_tokenizer_says_what_to_give() -> None:
    model = family("llama")
    with pytest.raises(ApproximationError, match="no tokenizer"), approximate(model, "teal:0.5"):
        pass
    assert active_label(model) == ""


def test_a_loaded_model_may_be_given(tiny: LoadedModel) -> None:
    with approximate(tiny, "a8") as active:
        assert active.notes and active_label(tiny.model) == "a8"
    assert replace(tiny).model is tiny.model
