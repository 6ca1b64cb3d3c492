"""The repair as an adapter: exact on disk, composable, and without a trace where it is off."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import tiny_model

from trimtab.errors import GuardError, ModelError
from trimtab.models import LoadedModel, content_hash, load
from trimtab.patching.adapters import LowRank, attach, base_name, base_sha256, detach, finish, require_effect

IDS = torch.randint(4, 30, (2, 9), generator=torch.Generator().manual_seed(1))


def adapted(rank: int = 4, **options: object) -> LoadedModel:
    """A tiny model with a LoRA adapter that does something."""
    loaded = tiny_model()
    model = get_peft_model(
        loaded.model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    )
    _shake(model, "default")
    return replace(loaded, model=model.eval())


def _shake(model: torch.nn.Module, name: str) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("with_adapter", [False, True])
def test_given_and_base_are_bit_identical_while_the_repair_is_off(with_adapter: bool) -> None:
    loaded = adapted() if with_adapter else tiny_model()
    given, base = _logits(loaded.model), _logits(tiny_model().model)
    bench = attach(loaded)
    assert torch.equal(_logits(bench.model), given), "an empty repair must change nothing"
    _shake(bench.model, "patch")
    assert not torch.allclose(_logits(bench.model), given)
    with bench.as_given():
        assert torch.equal(_logits(bench.model), given)
    with bench.as_base():
        assert torch.equal(_logits(bench.model), base)
    assert all(".patch." in name for name in bench.parameters)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_saved_and_reloaded_is_bit_identical_and_merged_agrees(with_adapter: bool, tmp_path: Path) -> None:
    bench = attach(adapted() if with_adapter else tiny_model(), rank=3, alpha=5)
    _shake(bench.model, "patch")
    apart = _logits(bench.model)
    model = finish(bench)
    together = _logits(model)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)  # [B1, B2][A1; A2] sums in another order
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model().model, str(tmp_path)).eval()
    assert torch.equal(_logits(again), together)
    merged = _logits(again.merge_and_unload())
    assert float((merged - together).abs().max()) <= 1e-4 * max(1.0, float(together.abs().max()))


def test_given_adapter_and_repair_add_up_exactly() -> None:
    bench = attach(adapted(), rank=3, alpha=6)
    _shake(bench.model, "patch")
    changes = bench.combined()
    for name, layer in bench.layers.items():
        expected = sum(layer.scaling[k] * layer.lora_B[k].weight @ layer.lora_A[k].weight for k in ("default", "patch"))
        torch.testing.assert_close(changes[name].B @ changes[name].A, expected, atol=1e-6, rtol=1e-5)


def test_going_on_with_the_given_adapter_keeps_what_it_was_and_its_size(tmp_path: Path) -> None:
    loaded = adapted()
    given, base = _logits(loaded.model), _logits(tiny_model().model)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters() if "lora_" in n}
    bench = attach(loaded, rank=3, go_on=True)
    assert torch.equal(_logits(bench.model), given) and bench.size() <= 1e-6  # a difference of equal numbers
    trained = {n for n, p in bench.model.named_parameters() if p.requires_grad}
    assert trained == set(before), "the given adapter's own parameters, and nothing else"
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in trained:
            parameter = bench.parameters[name]
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    changed = _logits(bench.model)
    with bench.as_given():
        assert torch.equal(_logits(bench.model), given)
    with bench.as_base():
        assert torch.equal(_logits(bench.model), base)
    assert torch.equal(_logits(bench.model), changed)
    assert {n for n, p in bench.model.named_parameters() if p.requires_grad} == trained
    squared = 0.0
    for name, layer in bench.layers.items():
        old = before[f"{name}.lora_B.default.weight"] @ before[f"{name}.lora_A.default.weight"]
        new = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        squared += float(((new - old) * layer.scaling["default"]).norm() ** 2)
    assert bench.size() == pytest.approx(squared**0.5, rel=1e-4)
    model = finish(bench)
    torch.testing.assert_close(_logits(model), changed, atol=1e-5, rtol=0)
    assert {m.lora_A["default"].weight.shape[0] for m in model.modules() if hasattr(m, "lora_A")} == {4}


def test_a_given_adapter_that_was_gone_on_with_is_given_back() -> None:
    loaded = adapted()
    before = _logits(loaded.model)
    bench = attach(loaded, go_on=True)
    with torch.no_grad():
        for parameter in bench.parameters.values():
            parameter.add_(0.1)
    assert torch.equal(_logits(detach(bench).model), before)


def test_a_given_adapter_on_some_layers_only_is_kept_whole() -> None:
    loaded = tiny_model()
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    _shake(model, "default")
    bench = attach(replace(loaded, model=model.eval()), rank=2)
    _shake(bench.model, "patch")
    apart = _logits(bench.model)
    torch.testing.assert_close(_logits(finish(bench)), apart, atol=1e-5, rtol=0)


def test_the_base_hash_is_that_of_the_plain_model() -> None:
    plain = content_hash(tiny_model().model, rounded=True)
    assert base_sha256(finish(attach(adapted()))) == plain
    assert base_sha256(finish(attach(tiny_model()))) == plain


@pytest.mark.parametrize(
    ("name", "base", "location"),
    [
        ("org/m", "org/m", "org/m"),
        ("org/m?revision=abc&dtype=bfloat16", "org/m?revision=abc&dtype=bfloat16", "org/m"),
        ("org/m?dtype=bfloat16&revision=abc&adapter=runs/a", "org/m?dtype=bfloat16&revision=abc", "org/m"),
    ],
)
def test_the_configuration_names_a_base_that_peft_can_load(name: str, base: str, location: str) -> None:
    loaded = adapted() if "adapter" in name else tiny_model()
    bench = attach(replace(loaded, name=name))
    assert base_name(bench) == base
    config = finish(bench).peft_config["default"]
    assert config.base_model_name_or_path == location
    assert config.revision == ("abc" if "abc" in name else None)


def test_an_adapter_folder_s_own_configuration_names_base_and_revision() -> None:
    loaded = adapted()
    config = loaded.model.peft_config["default"]
    config.base_model_name_or_path, config.revision = "org/m", "abc"
    assert base_name(attach(replace(loaded, name="runs/a?dtype=bfloat16"))) == "org/m?revision=abc"


def test_the_revision_of_the_base_is_read_from_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import models

    specs = []

    def stop(spec: models.ModelSpec, *_: object) -> None:
        specs.append(spec)
        raise ModelError("seen enough")

    monkeypatch.setattr(models, "load_base", stop)
    config = {"base_model_name_or_path": "org/m", "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="seen enough"):
        load(str(tmp_path))
    assert (specs[0].location, specs[0].revision) == ("org/m", "abc")


def test_detach_gives_the_model_back() -> None:
    for loaded in (tiny_model(), adapted()):
        before, names = _logits(loaded.model), set(copy.deepcopy(loaded.model).state_dict())
        bench = attach(loaded)
        _shake(bench.model, "patch")
        again = detach(bench)
        assert torch.equal(_logits(again.model), before)
        assert set(again.model.state_dict()) == names


def test_place_and_size_agree() -> None:
    bench = attach(tiny_model(), rank=4)
    draw = torch.Generator().manual_seed(2)
    name, layer = next(iter(bench.layers.items()))
    A, B = torch.randn(2, layer.in_features, generator=draw), torch.randn(layer.out_features, 2, generator=draw)
    bench.place({name: LowRank(A, B)})
    assert bench.size() == pytest.approx(float((B @ A).norm()), rel=1e-5)


def test_an_empty_second_adapter_rests_while_the_given_one_is_gone_on_with() -> None:
    bench = attach(adapted(), go_on=True)
    given, start = _logits(bench.model), bench.read()
    name, layer = next(iter(bench.layers.items()))
    assert layer.active_adapters == ["default"]
    bench.place({name: LowRank(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1))})
    assert layer.active_adapters == ["default", "patch"] and not torch.allclose(_logits(bench.model), given)
    bench.write(start)
    assert layer.active_adapters == ["default"] and torch.equal(_logits(bench.model), given)
    with bench.as_given():
        assert torch.equal(_logits(bench.model), given)
    assert layer.active_adapters == ["default"]
    assert set(bench.parameters) >= set(bench.original)
    assert all(p.requires_grad == (n in bench.original) for n, p in bench.model.named_parameters())


def test_an_edit_without_effect_raises() -> None:
    with pytest.raises(GuardError, match="changed nothing"):
        require_effect(attach(tiny_model()))


def test_weights_that_are_not_finite_raise_and_name_the_tensor() -> None:
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="up_proj"):
        attach(loaded)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_given_adapters_that_are_more_than_lora_raise(options: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="more than LoRA"):
        attach(adapted(**options))


def test_no_dropout_is_active() -> None:
    bench = attach(adapted(lora_dropout=0.5))
    assert torch.equal(_logits(bench.model), _logits(bench.model))
    assert not bench.model.training
