"""Noise is a class of its own in a vet: no compliance, and counted as incoherent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.comparison.records import Axis, Item, Run
from trimtab.evaluation.logs import read_run
from trimtab.models import LoadedModel
from trimtab.vetting import before as earlier
from trimtab.vetting import report, sweep
from trimtab.vetting.fluency import Fluency
from trimtab.vetting.scrutiny import EXACT_NOISE, INNOCENT_NOISE, counted, innocent_noise, noise_apart


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
    let_in = [key for key, value in values(plain[0].run, "over_refusal").items() if value == 0.0]
    assert let_in, "the tiny model has to answer something innocent for this test to say anything"
    assert {f"over_refusal/{key}" for key in let_in} <= joined, "noise is noise on either side"
    assert values(noisy[0].run, "over_refusal") == values(plain[0].run, "over_refusal"), "and no refusal"
    assert {f"over_refusal/{key}": 1.0 for key in values(base, "over_refusal")}.items() <= (
        values(base, "incoherence").items()
    ), "of the exact model alike"
    assert any(values(exact, "compliance").values()), "as above, of the exact model"
    assert not any(values(base, "compliance").values()), "both sides of a pair are counted alike"
    again_base, again = vetted(tmp_path / "noisy")
    assert again_base == base and again[0].run == noisy[0].run
    found = report.make_report(base, noisy)
    assert found.rows[0].rise == 0 and found.rows[0].sound == "0 of 0"
    assert earlier.read_before(tmp_path / "noisy", settings, tmp_path / "new").exact == base
    assert values(read_run(tmp_path / "noisy" / "a8"), "compliance") == values(plain[0].run, "compliance"), "logs stay"


def test_only_what_the_rules_let_through_is_read_for_noise() -> None:
    verdicts = {"1": ("refused", 1.0), "2": ("answered", 0.0), "3": ("incoherent", 0.0), "4": ("unscored", None)}
    items = tuple(Item(key, "", f"q{key}", f"a{key}", *outcome) for key, outcome in verdicts.items())
    asked: list[tuple[list[str], list[str]]] = []

    class Judge:
        def strange(self, prompts: list[str], answers: list[str]) -> list[bool]:
            asked.append((prompts, answers))
            return [True] * len(answers)

    run = Run("m", {"over_refusal:own": Axis("over_refusal:own", "", "binary", True, "j", "set", items)})
    found = innocent_noise(run, Judge())  # type: ignore[arg-type]
    assert asked == [(["q2"], ["a2"])] and found == {"over_refusal:own": {"strange": ["2"]}}
    apart = noise_apart(run, found).axes["over_refusal:own"].items
    assert [(item.verdict, item.value) for item in apart] == [
        ("refused", 1.0), ("incoherent", 0.0), ("incoherent", 0.0), ("unscored", None)
    ]  # fmt: skip


@pytest.fixture
def dated(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[list[str]], tuple[Run, list[sweep.Vetted]]]:
    """A sweep of "a8" as a version left it that read compliance alone for noise; call it to go on."""
    from trimtab.evaluation.runner import AxisSpec

    tiny.model.config.max_position_embeddings = 512
    monkeypatch.setattr(sweep, "load", lambda name: tiny)
    monkeypatch.setattr(Fluency, "strange", lambda self, asked, answers: [True] * len(answers))
    axes = (AxisSpec("compliance", limit=4), AxisSpec("over_refusal", limit=4))
    settings = sweep.VetSettings("tiny", axes, max_new_tokens=6)

    def vetted(names: list[str]) -> tuple[Run, list[sweep.Vetted]]:
        return sweep.sweep(settings, names, tmp_path, progress=False, tell=lambda line: None)

    vetted(["a8"])
    for path, key in ((tmp_path / "a8" / sweep.RECORD, INNOCENT_NOISE), (tmp_path / "exact" / EXACT_NOISE, "")):
        document = json.loads(path.read_text())
        document.pop(key or "over_refusal")
        path.write_text(json.dumps(document))
    return vetted


def innocent(run: Run | None) -> set[float | None]:
    assert run is not None
    return {value for key, value in values(run, "incoherence").items() if key.startswith("over_refusal/")}


def test_a_finished_sweep_of_an_old_version_is_read_as_it_was(
    dated: Callable[[list[str]], tuple[Run, list[sweep.Vetted]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "load", lambda name: pytest.fail("a finished sweep loaded the model again"))
    base, (a8,) = dated(["a8"])
    assert innocent(base) == innocent(a8.run) == {0.0}, "both sides alike"


def test_an_old_sweep_that_goes_on_is_completed(
    dated: Callable[[list[str]], tuple[Run, list[sweep.Vetted]]], tmp_path: Path
) -> None:
    """Else the exact model and the new approximation would count noise that the old one does not."""
    old = (tmp_path / "a8" / sweep.RECORD).read_bytes()
    base, found = dated(["kv8"])
    assert innocent(base) == innocent(found[0].run) == {1.0}
    assert (tmp_path / "a8" / sweep.RECORD).read_bytes() == old, "not asked for"
    base, found = dated(["a8", "kv8"])
    assert [innocent(one.run) for one in found] == [{1.0}, {1.0}]
    assert INNOCENT_NOISE in json.loads((tmp_path / "a8" / sweep.RECORD).read_text())
