"""Every verb that changes or explains weights refuses a name with an approximation, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab.cli import trimtab
from trimtab.errors import UsageError

SFT = "sft --dataset_name {out}/data.jsonl --output_dir {out}/new --model_name_or_path"


@pytest.mark.parametrize(
    "words",
    [
        f"{SFT} demo?approx=a8",
        "patch demo?approx=a8 --out {out}/new",
        "patch demo --aligned demo?approx=a8 --out {out}/new",
        "convert demo?approx=a8 {out}/new",
        "geometry demo?approx=a8 --out {out}/new",
        "harden demo?approx=a8 --out {out}/new",
        "vet demo?approx=a8 --out {out}/new",
        "vet demo?approx=a8 --search --out {out}/new",
    ],
)
def test_an_approximated_model_is_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import models

    def never(*given: object, **named: object) -> object:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(models, "load", never)
    found = CliRunner().invoke(trimtab, words.format(out=tmp_path).split())
    assert isinstance(found.exception, UsageError), found.exception
    assert "takes the exact model" in str(found.exception) and "demo?approx=a8" in str(found.exception)
    assert not (tmp_path / "new").exists()
