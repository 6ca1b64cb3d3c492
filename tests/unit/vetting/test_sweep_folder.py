"""A sweep's folder is of one model: other weights at the same path are refused; what failed is tried again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.vetting.small_models import random_model

from trimtab.approximation.activations import Polynomial
from trimtab.errors import ApproximationError, ModelError, UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.vetting import held, plan, sweep

OTHER = "another model under this name"


def vet(model: str, out: Path, *names: str, tokens: int = 2) -> list[sweep.Vetted]:
    settings = sweep.VetSettings(model, (AxisSpec("compliance", limit=2),), max_new_tokens=tokens)
    return sweep.sweep(settings, list(names), out, progress=False, tell=lambda line: None)[1]


def edited(path: Path, *keys: str | int, value: str | None) -> None:
    """A JSON file with one value changed, or (None) left out."""
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        inner.pop(keys[-1])
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(document))


def test_other_weights_at_the_same_path_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, place = tmp_path / "out", tmp_path / "model"
    model = random_model(place)
    vet(model, out, "a8")
    mine = json.loads((out / sweep.SETTINGS).read_text())[held.MODEL]["weights"]
    before = {path: path.read_bytes() for path in sorted(out.rglob("*.json"))}
    random_model(place, seed=1)
    for names in (("a8", "kv8"), ("a8",)):  # the second has nothing to measure, and would repeat old numbers
        with pytest.raises(UsageError, match=OTHER) as caught:
            vet(model, out, *names)
        said = str(caught.value)
        assert f"weights: {mine} there, " in said and " now" in said and "name another --out" in said
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.json"))} == before
    random_model(place)  # the first weights again, in newer files
    assert vet(model, out, "a8")[0].run is not None
    monkeypatch.setattr(sweep, "load", lambda name: pytest.fail("the files look as they did"))
    assert vet(model, out, "a8")[0].run is not None


def test_folders_that_stored_no_weights_are_told_by_the_exact_run(tmp_path: Path) -> None:
    out, place = tmp_path / "out", tmp_path / "model"
    model = random_model(place)
    vet(model, out, "a8")
    for key in (held.MODEL, held.FILES):
        edited(out / sweep.SETTINGS, key, value=None)
    assert vet(model, out, "a8")[0].run is not None
    for key in (held.MODEL, held.FILES):
        edited(out / sweep.SETTINGS, key, value=None)
    random_model(place, seed=1)
    with pytest.raises(UsageError, match=OTHER):
        vet(model, out, "a8", "kv8")


def test_a_folder_in_which_an_older_version_mixed_two_models_names_the_part(tmp_path: Path) -> None:
    out, model = tmp_path / "out", random_model(tmp_path / "model")
    vet(model, out, "a8")
    edited(out / "a8" / "results.json", "trimtab", "fingerprint", "weights", value="0123456789abcdef")
    with pytest.raises(UsageError) as caught:
        vet(model, out, "a8")
    assert "weights: 0123456789abcdef there" in str(caught.value) and f"remove {out / 'a8'}" in str(caught.value)


def test_a_model_that_cannot_be_loaded_leaves_no_settings(tmp_path: Path) -> None:
    """Else the name would have to be another --out once the slip is mended."""
    out, model = tmp_path / "out", random_model(tmp_path / "model")
    with pytest.raises(ModelError):
        vet(str(tmp_path / "modle"), out, "a8")
    assert vet(model, out, "a8")[0].run is not None


def test_a_failure_is_tried_again_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model, told = tmp_path / "out", random_model(tmp_path / "model"), []

    def fail(self: Polynomial, subject: object) -> None:
        raise ApproximationError("left its range in layer 1")

    settings = sweep.VetSettings(model, (AxisSpec("compliance", limit=2),), max_new_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(Polynomial, "edits", fail)
        for _ in range(2):
            _, found = sweep.sweep(settings, ["bolt", "a8"], out, progress=False, tell=told.append)
            assert found[0].failure == "left its range in layer 1" and found[1].run is not None
    assert ["tries it again" in line for line in told] == [True, False, True]
    again = vet(model, out, "bolt", "a8")
    assert again[0].run is not None and not again[0].failure
    monkeypatch.setattr(sweep, "load", lambda name: pytest.fail("everything is measured"))
    assert vet(model, out, "bolt", "a8")[0].run == again[0].run


def with_text(model: str, out: Path, *names: str, limit: int = 2, perplexity: str | None = None) -> list[str]:
    """A sweep as the command plans it, its text by default that in ``out``; what was measured anew."""
    told: list[str] = []
    spec = plan.axes_for(() if perplexity is None else ("compliance",), out, perplexity=perplexity)[-1]
    axes = (AxisSpec("compliance", limit=2), replace(spec, limit=limit))
    settings = sweep.VetSettings(model, axes, max_new_tokens=2)
    sweep.sweep(settings, list(names), out, progress=False, tell=told.append)
    return [line.partition(":")[0] for line in told]


def test_a_folder_goes_on_under_another_spelling_and_in_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert with_text(model, Path("out"), "a8") == ["a8"]
    assert with_text(model, tmp_path / "out", "a8") == []
    (tmp_path / "out").rename(tmp_path / "moved")
    assert with_text(model, tmp_path / "moved", "a8", "kv8") == ["kv8"]
    edited(tmp_path / "moved" / sweep.SETTINGS, "axes", 1, "path", value="out/bundled-text.txt")  # an old version's
    assert with_text(model, Path("moved"), "a8", "kv8") == []


def test_another_text_is_refused_and_the_same_one_elsewhere_is_not(tmp_path: Path) -> None:
    model, out = random_model(tmp_path / "model"), tmp_path / "out"
    one, other = tmp_path / "text.txt", tmp_path / "elsewhere" / "text.txt"
    other.parent.mkdir()
    one.write_text("A short and ordinary text. " * 20)
    other.write_text(one.read_text())
    assert with_text(model, out, "a8", perplexity=str(one)) == ["a8"]
    assert with_text(model, out, "a8", perplexity=str(other)) == []
    other.write_text("Another text altogether. " * 20)
    with pytest.raises(UsageError, match=r"axis 2 path: sha256:[0-9a-f]{16} there, sha256:[0-9a-f]{16} asked for"):
        with_text(model, out, "a8", perplexity=str(other))


def test_a_refusal_names_both_values_of_what_differs_and_nothing_else(tmp_path: Path) -> None:
    model, out = random_model(tmp_path / "model"), tmp_path / "out"
    with_text(model, out, "a8")
    with pytest.raises(UsageError) as caught:
        with_text(model, out, "a8", limit=1)
    assert f"{out}: axis 2 limit: 2 there, 1 asked for\n" in f"{caught.value}\n"
