"""A rotated model on disk: whole or not there, the given function, and taken by everything that takes a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.tiny import tiny_model
from tests.unit.vetting.small_models import random_model

from trimtab import models
from trimtab.cli import trimtab
from trimtab.errors import ModelError, UsageError
from trimtab.models import LoadedModel
from trimtab.vetting import rotate as job
from trimtab.vetting.rotate import RotateSettings, rotate_model


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(input_ids=torch.tensor([[5, 9, 12, 30, 7, 18]])).logits
    return found


def test_what_is_written_gives_the_logits_of_the_given_model(tmp_path: Path) -> None:
    source = random_model(tmp_path / "given")
    given = models.load(source)
    out = tmp_path / "out"
    ended = CliRunner().invoke(
        trimtab, ["harden", source, "--method", "rotate", "--seed", "3", "--out", str(out), "--json"]
    )
    assert ended.exit_code == 0, ended.output
    told = json.loads(ended.stdout)
    again = models.load(str(out))
    torch.testing.assert_close(logits(again), logits(given), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(again.model.model.embed_tokens.weight, given.model.model.embed_tokens.weight)
    record = json.loads((out / "trimtab.json").read_text())
    assert record["base"] == source and record["harden"] == {"method": "rotate", "model": source, "seed": 3}
    assert record["base_sha256"] == models.content_hash(given.model, rounded=True)
    assert told["gap"] < 1e-4 and told["error_after"] <= told["error_before"]
    assert told["size"] == (out / "model.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_it_says_what_was_done_and_what_to_do_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = CliRunner().invoke(
        trimtab, ["harden", random_model(tmp_path / "given"), "--method", "rotate", "--out", str(out)]
    )
    assert "the same function" in ended.output and f"trimtab harden {out}" in ended.output


@pytest.mark.parametrize("option", [["--steps", "3"], ["--noise", "a4"], ["--texts", "4"], ["--bf16"]])
def test_options_of_training_are_refused(option: list[str], tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        trimtab, ["harden", "demo", "--method", "rotate", *option, "--out", str(tmp_path / "out")]
    )
    assert ended.exit_code == 1
    assert option[0].removeprefix("--").split("/")[0] in str(ended.exception) + ended.output


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_model(tmp_path / "given")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        rotate_model(RotateSettings(source), full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]

    def fails(*_: object) -> None:
        raise ModelError("this model cannot be rotated", seen="test")

    monkeypatch.setattr(job, "rotate", fails)
    with pytest.raises(ModelError, match="cannot be rotated"):
        rotate_model(RotateSettings(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "given"]


def test_an_approximated_or_adapted_name_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("demo?approx=a8", "demo?adapter=runs/mine"):
        with pytest.raises(UsageError):
            rotate_model(RotateSettings(name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.is_quantized = True  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="quantised"):
        rotate_model(RotateSettings("tiny"), tmp_path / "out", loaded=loaded)
