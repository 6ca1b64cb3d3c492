"""A technique that does not fit the model is unmeasured with its reason, and the sweep goes on with the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer
from tests.unit.approximation.families import FAMILIES, SIZES, family
from tests.unit.approximation.test_packed_weights import Clipped, replaced

from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.vetting import sweep

AXES = (AxisSpec("compliance", limit=2),)


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setitem(SIZES, "max_position_embeddings", 512)
    assert name in FAMILIES
    model = family(name)
    model.generation_config.pad_token_id = 0
    found = LoadedModel(model=model, tokenizer=tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(sweep, "load", lambda _: found)
    return found


def test_weights_that_cannot_be_read_leave_one_technique_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama", monkeypatch).model
    model.get_input_embeddings().weight.data.mul_(50.0)
    replaced(model, Clipped)
    settings = sweep.VetSettings("tiny", AXES, max_new_tokens=2)
    _, vetted = sweep.sweep(settings, ["omniquant:8", "a8"], tmp_path, progress=False, tell=lambda line: None)
    assert vetted[0].run is None and "Clipped" in vetted[0].failure and "looked for" in vetted[0].failure
    assert vetted[1].run is not None and not vetted[1].failure
    assert "Clipped" in json.loads((tmp_path / "omniquant_8" / sweep.RECORD).read_text())["failure"]


def test_experts_state_what_is_not_measured_and_norms_what_was_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded("mixtral", monkeypatch)
    settings = sweep.VetSettings("tiny", AXES, max_new_tokens=2)
    names = ["a8", "nexus:norm=yes,layers=0-0"]
    _, vetted = sweep.sweep(settings, names, tmp_path, progress=False, tell=lambda line: None)
    for one in vetted:
        assert one.run is not None, one.failure
        measured = {shape["site"] for shape in one.record["errors"]["local"]}
        stated = any("down projections of stacked experts: not measured" in note for note in one.record["notes"])
        assert ("down" in measured) != stated
    assert any("RMS norms: sums outside" in note for note in vetted[1].record["notes"])
