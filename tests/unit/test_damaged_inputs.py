"""Damaged files, folders that hold something else, devices that are not there: named, without a stack trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model

from trimtab import models
from trimtab.anchors import SafetyAnchors
from trimtab.demo import DemoSettings
from trimtab.errors import DataError, ModelError, UsageError
from trimtab.geometry.rows import read_rows
from trimtab.json_files import read_json, read_object


@pytest.fixture
def base(tmp_path: Path) -> Path:
    loaded = tiny_model()
    loaded.model.save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = get_peft_model(models.load(str(base)).model, LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("device", "kind", "told"),
    [("abacus", UsageError, "unknown device"), ("cuda:999", ModelError, "CUDA device"), ("mps", ModelError, "MPS")],
)
def test_a_device_that_is_not_there(base: Path, device: str, kind: type[Exception], told: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(kind, match=told):
        models.load(f"{base}?device={device}")


@pytest.mark.parametrize("name", ["adapter_config.json", "trimtab.json"])
@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe", b"[]"])
def test_an_adapter_whose_papers_are_damaged(base: Path, adapter: Path, name: str, content: bytes) -> None:
    (adapter / name).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        models.load(f"{base}?adapter={adapter}")
    assert name in str(caught.value) and "save or download it again" in str(caught.value)


def test_a_folder_that_is_no_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no adapter \(no adapter_config\.json\)"):
        models.load(f"{base}?adapter={tmp_path / 'empty'}")


def test_a_model_folder_that_is_not_whole_is_not_blamed_on_the_hub(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="check that the folder holds") as caught:
        models.load(str(base))
    assert "hf auth" not in str(caught.value)


def test_a_chat_template_that_is_no_text(base: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="cannot read the chat template"):
        models.load(f"{base}?chat_template={tmp_path / 'template.jinja'}")


def test_task_rows_as_one_array_and_the_flag_that_named_them(tmp_path: Path) -> None:
    rows = [{"prompt": "route this", "completion": "billing"}, {"prompt": "and that", "completion": "delivery"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(tmp_path / "array.json") == read_rows(tmp_path / "lines.jsonl") == rows
    (tmp_path / "array.json").write_text(json.dumps([*rows, {"question": "?"}]))
    with pytest.raises(DataError, match="row 3"):
        read_rows(tmp_path / "array.json")
    with pytest.raises(DataError, match="check --data"):
        read_rows(tmp_path / "missing.jsonl")


def test_a_demo_with_an_unknown_guard_is_refused_before_it_owns_a_folder() -> None:
    with pytest.raises(UsageError, match="no such guard"):
        DemoSettings(guard="kiel")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"a": ')
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match=r"cannot be read") as caught:
        read_json(tmp_path / "cut.json", "the settings cannot be read", "remove it")
    assert "cut.json" in str(caught.value) and "remove it" in str(caught.value)
    with pytest.raises(ModelError, match="an object was expected"):
        read_object(tmp_path / "list.json", "it cannot be read", "save it again", ModelError)


def test_an_anchor_file_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "anchors.jsonl").write_text('{"request": "a", "side": \n')
    with pytest.raises(DataError, match="one JSON object a line"):
        SafetyAnchors.from_jsonl(tmp_path / "anchors.jsonl")
