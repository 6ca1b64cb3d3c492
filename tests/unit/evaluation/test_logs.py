"""Folders of logs that cannot be read as a run, and what the messages say."""

from __future__ import annotations

from pathlib import Path

import pytest
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log, write_eval_log
from inspect_ai.scorer import match
from tests.tiny import tiny_model

from trimtab.errors import DataError
from trimtab.evaluation.datasets import Prompt, PromptSet
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.provider import provider_for
from trimtab.evaluation.tasks import refusal_task


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> EvalLog:
    """A log of the safety task as plain inspect writes it: without the runner's fingerprint."""
    folder = tmp_path_factory.mktemp("log")
    prompts = PromptSet("mine", (Prompt("a", "c", "One?"), Prompt("b", "c", "Two?")))
    task = refusal_task("compliance", prompts, "mine", 8)
    inspect_eval(task, model=provider_for(tiny_model()), log_dir=str(folder), display="none")
    return read_eval_log(list_eval_logs(str(folder))[0])


def put(log: EvalLog, folder: Path, name: str = "x.eval") -> Path:
    folder.mkdir(exist_ok=True)
    write_eval_log(log, str(folder / name))
    return folder / name


def test_a_log_of_plain_inspect_is_a_run(finished: EvalLog, tmp_path: Path) -> None:
    put(finished, tmp_path)
    run = read_run(tmp_path)
    assert set(run.axes) == {"compliance:mine", "incoherence"}
    assert [item.id for item in run.axes["compliance:mine"].items] == ["a", "b"]
    assert run.fingerprint == {}
    assert read_run(tmp_path / "x.eval") == run


def test_metrics_are_in_the_log(finished: EvalLog) -> None:
    assert finished.results is not None
    metrics = finished.results.scores[0].metrics
    assert metrics["rate"].value == 1.0
    assert metrics["unscored"].value == 0.0
    assert 0 < metrics["wilson_low"].value < 1
    assert metrics["wilson_high"].value == 1.0


def test_no_folder_and_no_logs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run"):
        read_run(tmp_path / "none")
    with pytest.raises(DataError, match=r"trimtab eval MODEL --out"):
        read_run(tmp_path)


@pytest.mark.parametrize("status", ["started", "cancelled"])
def test_an_unfinished_log_says_how_to_resume(finished: EvalLog, tmp_path: Path, status: str) -> None:
    put(finished.model_copy(update={"status": status}), tmp_path)
    with pytest.raises(DataError, match=r"not finished[\s\S]*again[\s\S]*eval-retry"):
        read_run(tmp_path)


def test_a_corrupt_log_names_the_file(finished: EvalLog, tmp_path: Path) -> None:
    path = put(finished, tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.eval"):
            read_run(tmp_path)


def test_a_foreign_log_is_refused(tmp_path: Path) -> None:
    task = Task(dataset=[Sample(input="x", target="y")], scorer=match())
    inspect_eval(task, model=provider_for(tiny_model()), log_dir=str(tmp_path), display="none")
    with pytest.raises(DataError, match="not one of trimtab's"):
        read_run(tmp_path)


def test_a_log_without_samples_is_refused(finished: EvalLog, tmp_path: Path) -> None:
    put(finished.model_copy(update={"samples": []}), tmp_path)
    with pytest.raises(DataError, match="no samples"):
        read_run(tmp_path)


def test_an_unscored_sample_is_unscored_not_safe(finished: EvalLog, tmp_path: Path) -> None:
    assert finished.samples
    broken = finished.samples[0].model_copy(update={"scores": None})
    put(finished.model_copy(update={"samples": [broken, finished.samples[1]]}), tmp_path)
    first, second = read_run(tmp_path).axes["compliance:mine"].items
    assert (first.verdict, first.value) == ("unscored", None)
    assert second.value == 1.0


def test_a_summary_that_names_a_missing_log(finished: EvalLog, tmp_path: Path) -> None:
    put(finished, tmp_path)
    (tmp_path / "results.json").write_text('{"trimtab": {"logs": ["gone.eval"]}}')
    with pytest.raises(DataError, match="gone"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="summary"):
        read_run(tmp_path)
