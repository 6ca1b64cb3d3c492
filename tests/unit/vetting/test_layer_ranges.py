"""A range of layers that the model does not have is refused wherever a technique is applied, training included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trimtab import approximate, models
from trimtab.approximation.apply import edits_of
from trimtab.approximation.naming import parse
from trimtab.approximation.sites import find_sites
from trimtab.approximation.technique import Rows, Subject
from trimtab.cli import trimtab as command_line
from trimtab.errors import UsageError
from trimtab.models import LoadedModel
from trimtab.vetting import distill, sweep
from trimtab.vetting import harden as hardening
from trimtab.vetting.distill import DistillSettings, harden_by_distillation
from trimtab.vetting.harden import HardenSettings, harden

WORDS = r"(?s)no layer of this model.*layers=90-95; the model has layers 0 to 1"


def never(*_: object, **__: object) -> Any:
    raise AssertionError("the range is checked before anything is written or trained")


@pytest.mark.parametrize("name", ["noise:up=0.1,layers=90-95", "teal:0.5,layers=90-95", "bolt:layers=90-95"])
def test_hardening_refuses_it_before_it_trains(
    name: str, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardening, "bundled", never)
    monkeypatch.setattr(distill, "kept_lessons", never)
    with pytest.raises(UsageError, match=WORDS):
        harden(HardenSettings("tiny", name, batch_size=2), tmp_path, loaded=tiny)
    with pytest.raises(UsageError, match=WORDS):
        harden_by_distillation(DistillSettings("tiny", ("a8", name)), tmp_path, loaded=tiny)


@pytest.mark.parametrize("method", ["distill", "quada"])
def test_the_command_says_so(method: str, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: tiny)
    noise = ["--noise", "noise:up=0.1,layers=90-95"]
    result = CliRunner().invoke(
        command_line, ["harden", "tiny", "--method", method, *noise, "--out", str(tmp_path / "o")]
    )
    assert isinstance(result.exception, UsageError) and "no layer of this model" in str(result.exception)


def test_whoever_asks_a_technique_for_its_edits_is_told(tiny: LoadedModel) -> None:
    (technique,) = parse("a8:layers=90-95")
    subject = Subject(tiny.model, find_sites(tiny.model), Rows(), never)
    with pytest.raises(UsageError, match=WORDS):
        edits_of(technique, subject)
    with pytest.raises(UsageError, match=WORDS), approximate(tiny, "a8:layers=90-95"):
        pass


def test_a_sweep_refuses_it_before_anything_is_measured(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.evaluation.runner import AxisSpec

    monkeypatch.setattr(sweep, "load", lambda name: tiny)
    monkeypatch.setattr(sweep, "_exact", never)
    settings = sweep.VetSettings("tiny", (AxisSpec("compliance", limit=2),))
    with pytest.raises(UsageError, match=WORDS):
        sweep.sweep(settings, ["a8", "a4:layers=90-95"], tmp_path, progress=False)
