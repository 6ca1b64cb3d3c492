"""Several processes: what they measure is what one measures; their errors are told; how many fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.vetting import sweep, workers

AXES = (AxisSpec("compliance", limit=4), AxisSpec("over_refusal", limit=4))


@pytest.fixture
def saved(tiny: LoadedModel, tmp_path: Path) -> str:
    tiny.model.config.max_position_embeddings = 512
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def test_two_processes_measure_what_one_does(saved: str, tmp_path: Path) -> None:
    settings = sweep.VetSettings(saved, AXES, max_new_tokens=4)
    told: list[str] = []
    names = ["teal:0.5", "a8"]
    base, one = sweep.sweep(settings, names, tmp_path / "one", progress=False, tell=lambda line: None)
    again, two = sweep.sweep(settings, names, tmp_path / "two", workers=2, progress=False, tell=told.append)
    assert base.axes == again.axes
    assert [vetted.name for vetted in two] == names  # in the order asked for, whichever ended first
    for alone, shared in zip(one, two, strict=True):
        assert alone.run is not None and shared.run is not None
        assert alone.run.axes == shared.run.axes
        assert alone.record["errors"] == shared.record["errors"]
    assert len(told) == 2 and told[-1].endswith("2 of 2)")


def test_an_error_of_a_process_is_told_as_it_is(tmp_path: Path) -> None:
    settings = sweep.VetSettings(str(tmp_path / "nowhere"), AXES)
    with pytest.raises(TrimtabError, match="nowhere"):
        workers.measure_all(settings, ["a8"], tmp_path, 2, lambda *_: None)


def test_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed form: free memory / (2 x 3 x weights), no more than names, cores and ``most``."""
    weights = torch.nn.Linear(1000, 250, bias=False)  # 1 MB
    loaded = SimpleNamespace(model=weights, device=torch.device("cpu"))
    monkeypatch.setattr(workers, "cores", lambda: 16)
    for free, names, expected in ((19e6, 9, 3), (1e12, 9, 4), (1e12, 2, 2), (1e3, 9, 1)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert workers.fitting(loaded, names) == expected  # type: ignore[arg-type]
    loaded.device = torch.device("cuda")
    assert workers.fitting(loaded, 9) == 1  # type: ignore[arg-type]
