"""kill -9 while generating, judging and writing; two runs in one folder; a full disk; an empty set; NaN logits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model

from trimtab.comparison.records import Run
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import batching, runner
from trimtab.evaluation.folders import alone_in
from trimtab.evaluation.journal import Journal
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = 24
SCRIPT = """
import os, sys, time
from pathlib import Path
from tests.tiny import tiny_model
from trimtab.evaluation import batching, ladder, runner, tasks
from trimtab.evaluation.judges import Verdict
from trimtab.generation import Generation

folder, stage = Path(sys.argv[1]), sys.argv[2]
marks = folder.parent / "marks"

def mark(name):
    with marks.open("a") as stream:
        stream.write(name + "\\n")

def answer(loaded, take, done, settings):
    while prompts := take(settings.batch_size):
        mark("batch")
        time.sleep(0.25 if stage == "generating" else 0)
        for prompt in prompts:
            done(prompt, Generation("Sure, here is " + prompt.key.messages[-1]["content"], 3, 3, False))

class Slow:
    name, positive = "slow@1", "harmful"
    async def verdict(self, exchange):
        import asyncio
        if stage == "judging":
            await asyncio.sleep(0.1 * (1 + int(exchange.prompt.split()[-1])))
        mark("verdict")
        return Verdict("harmful", True, "")

def summary(*arguments):
    mark("writing")
    time.sleep(60)

batching.answer = answer
ladder.make_judge = lambda name: Slow()
if stage == "writing":
    runner.write_summary = summary
specs = [runner.AxisSpec("compliance", "p", path=str(folder.parent / "p.jsonl"))]
runner.evaluate(tiny_model(), specs, out=folder, batch_size=4, progress=False, judge="rubric:slow")
mark("done")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"prompt": f"please bake {number}", "id": str(number)} for number in range(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def marks(place: Path) -> list[str]:
    path = place / "marks"
    return path.read_text().split() if path.is_file() else []


def start(place: Path, stage: str) -> subprocess.Popen[bytes]:
    script = place / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), str(place / "out"), stage], env=environment, stderr=subprocess.PIPE
    )


def kill_when(process: subprocess.Popen[bytes], place: Path, word: str, count: int) -> None:
    """kill -9 as soon as a word was marked so often."""
    limit = time.monotonic() + 400
    while marks(place).count(word) < count:
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            raise AssertionError(process.communicate()[1].decode()[-2000:])
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(place: Path) -> None:
    process = start(place, "straight on")
    assert process.wait(timeout=400) == 0, process.communicate()[1].decode()[-2000:]


def values(run: Run) -> list[tuple[str, str, float | None]]:
    return sorted((item.id, item.answer, item.value) for item in run.axes["compliance:p"].items)


@pytest.mark.parametrize(("stage", "word", "count"), [("generating", "batch", 4), ("judging", "verdict", 8),
                                                      ("writing", "writing", 1)])  # fmt: skip
def test_a_killed_run_goes_on_and_ends_the_same(place: Path, stage: str, word: str, count: int) -> None:
    kill_when(start(place, stage), place, word, count)
    before = marks(place)
    finish(place)
    after = marks(place)[len(before) :]
    assert values(read_run(place / "out")) == [
        (one, f"Sure, here is please bake {one}", 1.0) for one in sorted(map(str, range(PROMPTS)))
    ]
    batches = before.count("batch") + after.count("batch")
    assert batches <= PROMPTS // 4 + 1  # at most the batch in flight is generated twice
    if stage == "judging":
        assert after.count("verdict") <= PROMPTS - count + 1
    if stage == "writing":
        assert after == ["done"]  # everything was there but the summary
    assert not list((place / "out").glob(".answers-*"))
    assert not list((place / "out").glob("*.partial"))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UsageError, match="another run is writing"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass  # free again


def test_a_torn_line_of_the_journal_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path)
    first.put("a", [1, 2])
    first.close(complete=False)
    path.write_bytes(path.read_bytes() + b'["b", [3, ')
    second = Journal(path)
    assert second.get("a") == [1, 2] and second.get("b") is None
    second.put("c", 4)
    second.close(complete=False)
    assert Journal(path).get("c") == 4
    Journal(path).close(complete=True)
    assert not path.exists()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(loaded: Any, take: Any, done: Any, settings: Any) -> None:
        while prompts := take(settings.batch_size):
            for prompt in prompts:
                done(prompt, Generation("I can't help with that.", 3, 3, False))

    monkeypatch.setattr(batching, "answer", answer)


def test_a_full_disk_while_the_summary_is_written_loses_nothing(
    place: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [AxisSpec("compliance", "p", path=str(place / "p.jsonl"), limit=4)]
    evaluate(tiny_model(), specs, out=place / "out", progress=False)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(tiny_model(), specs, out=place / "out", progress=False)
    monkeypatch.undo()
    assert len(read_run(place / "out").axes["compliance:p"].items) == 4


def test_an_empty_set_is_an_error_and_never_a_perfect_score(place: Path) -> None:
    (place / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        evaluate(tiny_model(), [AxisSpec("compliance", "p", path=str(place / "p.jsonl"))], out=place / "out")


def test_a_model_with_nan_logits_is_not_called_safe(place: Path) -> None:
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(float("nan"))
    specs = [AxisSpec("compliance", "p", path=str(place / "p.jsonl"), limit=3)]
    run = evaluate(loaded, specs, out=place / "out", progress=False, max_new_tokens=8)
    scored = [item.value for item in run.axes["compliance:p"].items]
    broken = [item.value for item in run.axes["incoherence"].items]
    assert 0.0 not in broken  # either unscored or incoherent
    assert all(value is None or value == 0.0 for value in scored)


def test_a_prompt_longer_than_the_context_is_unscored(place: Path, plain: None) -> None:
    rows = [{"prompt": "please " * 400, "id": "long"}, {"prompt": "please", "id": "short"}]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    specs = [AxisSpec("compliance", "p", path=str(place / "p.jsonl"))]
    run = evaluate(tiny_model(), specs, out=place / "out", progress=False)
    assert {item.id: item.value for item in run.axes["compliance:p"].items} == {"long": None, "short": 0.0}


def test_a_judge_that_dies_stops_the_run_and_keeps_the_answers(
    place: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        name, positive = "dead@1", "harmful"

        async def verdict(self, exchange: Any) -> Any:
            raise ConnectionError("connection refused")

    monkeypatch.setattr("trimtab.evaluation.ladder.make_judge", lambda name: Dead())
    specs = [AxisSpec("compliance", "p", path=str(place / "p.jsonl"), limit=4)]
    with pytest.raises(DataError, match="did not finish"):
        evaluate(tiny_model(), specs, out=place / "out", progress=False, judge="rubric:dead")
    (kept,) = (place / "out").glob(".answers-*")
    assert len(kept.read_text().splitlines()) == 4
    with pytest.raises(DataError):
        read_run(place / "out")
    assert runner.finished(place / "out") == {}
