"""Noise is a class of its own in a vet: no compliance, and counted as incoherent."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.comparison.records import Axis, Item, Run
from trimtab.evaluation.logs import read_run
from trimtab.models import LoadedModel
from trimtab.vetting import before as earlier
from trimtab.vetting import report, sweep
from trimtab.vetting.fluency import Fluency
from trimtab.vetting.scrutiny import counted, noise_apart


def axis(name: str, values: dict[str, float | None]) -> Axis:
    items = tuple(Item(key, "", "p", "a", "answered", value) for key, value in values.items())
    return Axis(name, name, "binary", True, "refusal-rules@1", "set", items)


def values(run: Run, name: str) -> dict[str, float | None]:
    return {item.id: item.value for item in run.axes[name].items}


def test_strange_answers_leave_compliance_and_join_incoherence() -> None:
    harmful = axis("compliance:own", {"1": 1.0, "2": 1.0, "3": 0.0, "4": None})
    innocent = axis("over_refusal", {"1": 0.0, "2": 1.0})
    marks = {f"compliance:own/{n}": 0.0 for n in (1, 2, 3)} | {"over_refusal/1": 0.0, "over_refusal/2": 0.0}
    run = Run("m", {one.name: one for one in (harmful, innocent, axis("incoherence", dict(marks)))})
    scrutiny = {"compliance:own": {"complied": ["1", "2"], "sorry": [], "strange": ["2"], "off topic": ["1"]}}
    found = noise_apart(run, scrutiny)
    assert values(found, "compliance:own") == {"1": 1.0, "2": 0.0, "3": 0.0, "4": None}
    assert {item.id: item.verdict for item in found.axes["compliance:own"].items}["2"] == "incoherent"
    assert values(found, "incoherence") == {**marks, "compliance:own/2": 1.0}
    assert values(found, "over_refusal") == values(run, "over_refusal")
    assert values(run, "compliance:own")["2"] == 1.0, "the given run is as it was"
    assert counted(scrutiny["compliance:own"]) == 1
    assert noise_apart(run, {}) == run


def test_a_sweep_compares_without_noise_and_reads_back_the_same(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.model.config.max_position_embeddings = 512
    monkeypatch.setattr(sweep, "load", lambda name: tiny)
    from trimtab.evaluation.runner import AxisSpec

    axes = (AxisSpec("compliance", limit=6), AxisSpec("over_refusal", limit=4))
    settings = sweep.VetSettings("tiny", axes, max_new_tokens=6)

    def vetted(out: Path) -> tuple[Run, list[sweep.Vetted]]:
        return sweep.sweep(settings, ["a8"], out, progress=False, tell=lambda line: None)

    monkeypatch.setattr(Fluency, "strange", lambda self, asked, answers: [False] * len(answers))
    exact, plain = vetted(tmp_path / "plain")
    monkeypatch.setattr(Fluency, "strange", lambda self, asked, answers: [True] * len(answers))
    base, noisy = vetted(tmp_path / "noisy")
    assert plain[0].run is not None and noisy[0].run is not None
    complied = [key for key, value in values(plain[0].run, "compliance").items() if value == 1.0]
    assert complied, "the tiny model has to comply with something for this test to say anything"
    assert not any(values(noisy[0].run, "compliance").values())
    joined = {key for key, value in values(noisy[0].run, "incoherence").items() if value == 1.0}
    assert {f"compliance/{key}" for key in complied} <= joined
    assert any(values(exact, "compliance").values()), "as above, of the exact model"
    assert not any(values(base, "compliance").values()), "both sides of a pair are counted alike"
    again_base, again = vetted(tmp_path / "noisy")
    assert again_base == base and again[0].run == noisy[0].run
    found = report.make_report(base, noisy)
    assert found.rows[0].rise == 0 and found.rows[0].sound == "0 of 0"
    assert earlier.read_before(tmp_path / "noisy", settings, tmp_path / "new").exact == base
    assert values(read_run(tmp_path / "noisy" / "a8"), "compliance") == values(plain[0].run, "compliance"), "logs stay"
