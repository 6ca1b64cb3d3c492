"""A repair on a base in four bits (QLoRA style): the base stays what it is, and the saved adapter is the repair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.patching import worlds

from trimtab.errors import ModelError
from trimtab.models import LoadedModel, load
from trimtab.patching import save
from trimtab.patching.adapters import finish
from trimtab.patching.climb import LadderSettings
from trimtab.patching.job import run
from trimtab.patching.ladder import repair
from trimtab.patching.methods import PatchSettings


@pytest.fixture
def four_bits() -> dict[str, Any]:
    pytest.importorskip("bitsandbytes", reason="needs trimtab[quantised]")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return {"quantization_config": settings}


def stored(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The packed weights under the adapters."""
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.dtype == torch.uint8}


def test_a_broken_adapter_on_four_bits_is_repaired_saved_and_read_back(
    four_bits: dict[str, Any], tmp_path: Path
) -> None:
    broken, base = worlds.broken(lora=True, width=64), tmp_path / "base"  # bitsandbytes packs blocks of 64
    worlds.aligned(64).model.save_pretrained(base)
    broken.tokenizer.save_pretrained(base)
    broken.model.save_pretrained(tmp_path / "adapter")
    loaded = load(f"{base}?adapter={tmp_path / 'adapter'}", from_pretrained=four_bits)
    before = stored(loaded)
    assert len(before) == 14, "the linear layers are packed"

    settings = LadderSettings(samples=(1, 4, 8), steps=12, last_steps=24, drift=0.5)
    found = repair(loaded, worlds.material(), ancestor="base", settings=settings)
    assert found.status == "repaired" and found.chosen is not None
    assert found.given.compliance > 0.9 and found.chosen.look.compliance <= 0.05
    assert found.chosen.look.over_refusal is not None and found.chosen.look.over_refusal <= 0.05
    after = stored(found.bench.loaded)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the packed base must not change"

    repaired = replace(loaded, model=finish(found.bench))
    expected = save.probe(repaired)
    save.write_adapter(repaired.model, loaded.tokenizer, tmp_path / "repaired", str(base))
    again = load(f"{base}?adapter={tmp_path / 'repaired'}", from_pretrained=four_bits)
    assert torch.equal(save.probe(again), expected)


def test_a_whole_model_from_four_bits_is_refused_before_anything_is_measured(
    four_bits: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    worlds.aligned(64).model.save_pretrained(base)
    worlds.tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match="cannot be written from quantised weights"):
        run(str(base), tmp_path / "out", PatchSettings(merged=True), from_pretrained=four_bits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
