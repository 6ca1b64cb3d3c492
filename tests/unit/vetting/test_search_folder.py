"""A search's folder holds points of one model, one set of prompts, one length: anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.unit.vetting.small_models import random_model

from trimtab.cli import trimtab as command_line
from trimtab.errors import DataError, UsageError
from trimtab.vetting import search
from trimtab.vetting.probe import Probe


class StopError(Exception):
    """After the first point."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A search of the exact model's point only; the prompts put to the model by each call."""
    found: list[int] = []

    def answers(self: Probe, name: str, requests: Any) -> list[str]:
        found.append(len(requests))
        return ["refused"] * len(requests)

    def one_point(probe: Probe, site: str) -> None:
        probe.point(site, 0.0)
        raise StopError

    monkeypatch.setattr(Probe, "_answers", answers)
    monkeypatch.setattr(search, "own_refusals", lambda probe: [])
    monkeypatch.setattr(search, "search_site", one_point)
    return found


def run(model: str, out: Path, more: str = "") -> BaseException | None:
    words = f"vet {model} --search --search-prompts 8 --seeds 1 --max-new-tokens 4 --out {out} {more}"
    return CliRunner().invoke(command_line, words.split()).exception


def test_other_weights_prompts_seeds_and_lengths_are_refused(tmp_path: Path, asked: list[int]) -> None:
    model, other, out = random_model(tmp_path / "a"), random_model(tmp_path / "b", seed=1), tmp_path / "out"
    assert isinstance(run(model, out), StopError) and isinstance(run(model, out), StopError)
    assert asked == [8], "the second call reads the point of the first"
    assert isinstance(run(model, out, "--batch-size 2"), StopError)  # rounding only
    before = (out / search.SETTINGS).read_bytes()
    for words, differs in (
        ((other, out), "weights: "),
        ((model, out, "--search-prompts 16"), "prompts: 8 ("),
        ((model, out, "--seeds 2"), "seeds: 1 there, 2 asked for"),
        ((model, out, "--max-new-tokens 5"), "max_new_tokens: 4 there, 5 asked for"),
    ):
        error = run(*words)
        assert isinstance(error, UsageError) and "another search" in str(error)
        assert differs in str(error) and f"remove {out / search.POINTS}" in str(error)
    assert asked == [8] and (out / search.SETTINGS).read_bytes() == before
    (out / search.POINTS).unlink()  # as the message says
    assert isinstance(run(other, out), StopError) and asked == [8, 8]


def test_more_prompts_begin_with_those_of_fewer_and_are_another_search(tmp_path: Path, asked: list[int]) -> None:
    """Any first part of the bundled set is spread over its categories."""
    from trimtab.models import load

    loaded = load(random_model(tmp_path / "model"))
    many, few = (Probe(loaded, count, 1, 4, 8, tmp_path / "p.jsonl", print) for count in (48, 24))
    assert many.requests[:24] == few.requests and many.measured_by()["prompts"] != few.measured_by()["prompts"]


def test_a_folder_that_does_not_say_whose_points_it_holds_is_refused(tmp_path: Path, asked: list[int]) -> None:
    model, out = random_model(tmp_path / "model"), tmp_path / "out"
    assert isinstance(run(model, out), StopError)
    (out / search.SETTINGS).write_text("{")
    assert isinstance(run(model, out), DataError)
    (out / search.SETTINGS).unlink()  # as a version left it that wrote none
    error = run(model, out)
    assert isinstance(error, UsageError) and "does not say of which model" in str(error)
    assert not (out / search.SETTINGS).exists()


def test_a_vet_and_a_search_may_share_a_folder(tmp_path: Path, asked: list[int]) -> None:
    from trimtab.vetting import sweep

    out = tmp_path / "out"
    out.mkdir()
    (out / sweep.SETTINGS).write_text(json.dumps({"model": "another"}))
    assert isinstance(run(random_model(tmp_path / "model"), out), StopError)


def test_an_approximated_model_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "load", lambda name: pytest.fail("a model was loaded"))
    error = run("demo?approx=a8", tmp_path / "out")
    assert isinstance(error, UsageError) and "exact model" in str(error)


def test_a_model_that_refuses_nothing_is_told_before_it_is_searched(tmp_path: Path) -> None:
    found = run(random_model(tmp_path / "a"), tmp_path / "out")
    assert isinstance(found, DataError) and "refuses none of the prompts" in str(found)
    assert not (tmp_path / "out" / search.POINTS).exists()
