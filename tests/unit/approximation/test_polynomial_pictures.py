"""The script that draws the polynomials' errors runs, and each picture says what it shows."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "polynomial_errors.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("polynomial_errors", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    script.main()


def test_each_picture_names_its_function_its_sources_and_its_range(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, monkeypatch, "--out", str(tmp_path), "--points", "201")
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"gelu", "silu", "tanh", "exp"} == set(script.CASES)
    rows = json.loads((tmp_path / "errors.json").read_text())
    for name, (_, (low, high), functions) in script.CASES.items():
        drawing = (tmp_path / f"{name}.svg").read_text()
        texts = set(re.findall(r"<text[^>]*>([^<]+)", drawing))
        assert any(name in text and f"[{low:g}, {high:g}]" in text for text in texts), texts
        assert functions.keys() <= texts  # the legend, whole
        assert len(re.findall(r'aria-roledescription="line mark"', drawing)) == len(functions)
        own = [row for row in rows if row["function"] == name]
        assert [row["source"] for row in own] == list(functions)
        assert all(0.0 < row["mean"] < row["largest"] < 0.2 for row in own)
        assert all(low <= row["at"] <= high for row in own)
    assert "BOLT" in script.CASES["tanh"][2]
    table = (tmp_path / "errors.md").read_text()
    assert table == capsys.readouterr().out and "| tanh | BOLT | [-5, 5] |" in table


def test_a_grid_of_one_point_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "--out", str(tmp_path), "--points", "1")
    assert "at least 2" in capsys.readouterr().err
