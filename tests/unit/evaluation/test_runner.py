"""A whole evaluation of a tiny model: axes, logs, resuming, what can be wrong with a folder of logs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab.comparison.records import Run
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import batching, runner
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.runner import AxisSpec, default_axes, evaluate
from trimtab.generation import Generation
from trimtab.models import LoadedModel

ANSWERS = {
    "please": "I can't help with that.",
    "bake": "Sure, here is how: mix and bake.",
    "weather": "the cake is a cake is a " + "cake is a " * 20,
    "yes": "",
    "route": "billing",
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model answers by the first word of the prompt; the list records the batches."""
    sizes: list[int] = []

    def answer(loaded: LoadedModel, chats: Any, settings: Any) -> list[Generation]:
        sizes.append(len(chats))
        return [Generation(ANSWERS[chat[-1]["content"].split()[0]], 5, 5, False) for chat in chats]

    monkeypatch.setattr(batching, "answer", in_batches(answer))
    return sizes


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def axes(tmp_path: Path) -> list[AxisSpec]:
    prompts = [{"prompt": word, "category": word[0], "id": word} for word in ("please", "bake", "weather", "yes")]
    harmful = lines(tmp_path / "h.jsonl", *prompts)
    benign = lines(tmp_path / "b.jsonl", *prompts)
    questions = lines(
        tmp_path / "q.jsonl",
        {"prompt": "route a", "answer": "billing", "choices": ["billing", "delivery"]},
        {"prompt": "route b", "answer": "delivery", "choices": ["billing", "delivery"]},
        {"prompt": "yes", "answer": "billing", "choices": ["billing", "delivery"]},
    )
    return [
        AxisSpec("compliance", "h", path=harmful),
        AxisSpec("over_refusal", "b", path=benign),
        AxisSpec("accuracy", path=questions),
    ]


def measure(tiny: LoadedModel, axes: list[AxisSpec], out: Path, **options: Any) -> Run:
    return evaluate(tiny, axes, out=out, progress=False, **options)


@pytest.mark.usefixtures("scripted")
def test_verdicts_values_and_derived_axis(tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path) -> None:
    run = measure(tiny, axes, tmp_path / "run")
    assert set(run.axes) == {"compliance:h", "over_refusal:b", "accuracy:q", "incoherence"}
    verdicts = {name: {i.prompt: (i.verdict, i.value) for i in axis.items} for name, axis in run.axes.items()}
    assert verdicts["compliance:h"] == {
        "please": ("refused", 0.0), "bake": ("harmful", 1.0), "weather": ("incoherent", 0.0), "yes": ("unscored", None)
    }  # fmt: skip
    assert verdicts["over_refusal:b"] == {
        "please": ("refused", 1.0), "bake": ("answered", 0.0), "weather": ("incoherent", 0.0), "yes": ("unscored", None)
    }  # fmt: skip
    assert verdicts["accuracy:q"] == {
        "route a": ("correct", 1.0), "route b": ("incorrect", 0.0), "yes": ("unscored", None)
    }  # fmt: skip
    assert {prompt: value for prompt, (_, value) in verdicts["incoherence"].items()} == {
        "please": 0.0, "bake": 0.0, "weather": 1.0, "yes": None
    }  # fmt: skip
    assert len({item.id for item in run.axes["incoherence"].items}) == 8
    compliance = run.axes["compliance:h"]
    assert compliance.judge == "refusal-rules@1"
    assert compliance.dataset.startswith("h@sha256:")
    assert compliance.lower_is_better
    assert not run.axes["accuracy:q"].lower_is_better
    assert all(item.category == item.prompt[0] and item.id == item.prompt for item in compliance.items)
    assert {"weights", "tokenizer", "chat_template", "generation", "decoding"} <= set(run.fingerprint)
    assert run.model == "tiny"


@pytest.mark.usefixtures("scripted")
def test_reading_the_folder_gives_the_same_run(tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path) -> None:
    run = measure(tiny, axes, tmp_path / "run")
    assert read_run(tmp_path / "run") == run
    (tmp_path / "run" / "results.json").unlink()
    assert read_run(tmp_path / "run").axes.keys() == run.axes.keys()


@pytest.mark.usefixtures("scripted")
def test_summary_has_the_harness_shape(tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path) -> None:
    measure(tiny, axes, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["results"]["compliance:h"]["rate,none"] == pytest.approx(1 / 3)
    assert found["results"]["compliance:h"]["unscored,none"] == pytest.approx(1 / 4)
    assert found["results"]["accuracy:q"]["acc,none"] == 0.5
    assert found["n-samples"]["compliance:h"] == {"original": 4, "effective": 3}
    assert found["higher_is_better"]["accuracy:q"]["acc"] is True
    assert found["higher_is_better"]["compliance:h"]["rate"] is False


def test_all_axes_share_batches(tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path, scripted: list[int]) -> None:
    measure(tiny, axes, tmp_path / "run")
    assert scripted == [11]


def test_a_large_measurement_finishes_axis_by_axis(
    tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path, scripted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "TOGETHER_BATCHES", 0)
    measure(tiny, axes, tmp_path / "run")
    assert scripted == [4, 2]  # the second axis asks the same prompts, the third one of them: kept in the journal


def test_finished_axes_are_not_run_again(
    tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path, scripted: list[int]
) -> None:
    first = measure(tiny, axes[:1], tmp_path / "run")
    assert scripted == [4]
    again = measure(tiny, axes[:1], tmp_path / "run")
    assert again == first
    assert scripted == [4]
    both = measure(tiny, axes[:2], tmp_path / "run")
    assert scripted == [4, 4]
    assert both.axes["compliance:h"] == first.axes["compliance:h"]


@pytest.mark.parametrize("change", ["weights", "tokens", "prompts", "limit"])
def test_whatever_changes_the_answer_is_measured_again(
    tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path, scripted: list[int], change: str
) -> None:
    measure(tiny, axes[:1], tmp_path / "run")
    options: dict[str, Any] = {}
    if change == "weights":
        tiny = tiny_model(seed=1)
    elif change == "tokens":
        options["max_new_tokens"] = 7
    elif change == "limit":
        options["limit"] = 2
    else:
        lines(tmp_path / "h.jsonl", {"prompt": "please now", "id": "please"})
    run = measure(tiny, axes[:1], tmp_path / "run", **options)
    assert len(scripted) == 2
    assert read_run(tmp_path / "run") == run  # the summary names the logs that count


@pytest.mark.usefixtures("scripted")
def test_two_models_in_one_folder_raise(axes: list[AxisSpec], tmp_path: Path) -> None:
    measure(tiny_model(seed=0), axes[:1], tmp_path / "run")
    measure(tiny_model(seed=1), axes[1:2], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(DataError, match="different models"):
        read_run(tmp_path / "run")


def test_a_failure_says_so_and_the_rest_can_be_resumed(
    tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: list[int]
) -> None:
    monkeypatch.setitem(ANSWERS, "weather", None)  # the decoder "breaks" on one prompt

    def broken(loaded: LoadedModel, chats: Any, settings: Any) -> list[Generation]:
        raise RuntimeError("out of memory")

    working = batching.answer
    monkeypatch.setattr(batching, "answer", in_batches(broken))
    with pytest.raises(DataError, match="out of memory"):
        measure(tiny, axes[:1], tmp_path / "run")
    with pytest.raises(DataError, match="failed"):
        read_run(tmp_path / "run")
    monkeypatch.setattr(batching, "answer", working)
    monkeypatch.setitem(ANSWERS, "weather", "Sure, fine.")
    run = measure(tiny, axes[:1], tmp_path / "run")
    assert len(run.axes["compliance:h"].items) == 4
    assert read_run(tmp_path / "run") == run


def test_perplexity_of_a_text(tiny: LoadedModel, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("please help with a cake\n" * 10)
    run = measure(tiny, [AxisSpec("perplexity", path=str(text), window_chars=60)], tmp_path / "run")
    axis = run.axes["perplexity"]
    assert axis.kind == "continuous"
    assert axis.lower_is_better
    assert len(axis.items) == 5
    assert all(item.value and 0 < item.value < 10 and item.verdict == "" for item in axis.items)
    assert "incoherence" not in run.axes


def test_nothing_to_measure_raises_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no axes"):
        evaluate("no-such-model", [], out=tmp_path)
    with pytest.raises(DataError, match="no file"):
        evaluate("no-such-model", [AxisSpec("compliance", "x", path=str(tmp_path / "none.jsonl"))], out=tmp_path)
    with pytest.raises(UsageError, match="text file"):
        evaluate("no-such-model", [AxisSpec("perplexity")], out=tmp_path)


def test_the_same_axis_twice_raises(tiny: LoadedModel, axes: list[AxisSpec], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        measure(tiny, [axes[0], axes[0]], tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "kind", "dataset", "path"),
    [
        ("compliance", "compliance", "bundled", None),
        ("over_refusal", "over_refusal", "bundled", None),
        ("compliance:advbench", "compliance", "advbench", None),
        ("compliance:advbench=a.csv", "compliance", "advbench", "a.csv"),
        ("advbench=a.csv", "compliance", "advbench", "a.csv"),
        ("xstest-safe=x.csv", "over_refusal", "xstest-safe", "x.csv"),
        ("accuracy=my.jsonl", "accuracy", "my", "my.jsonl"),
        ("perplexity=t.txt", "perplexity", "t", "t.txt"),
        ("harmbench", "compliance", "harmbench", None),
    ],
)
def test_axis_names(text: str, kind: str, dataset: str, path: str | None) -> None:
    spec = AxisSpec.parse(text)
    assert (spec.kind, spec.dataset, spec.path) == (kind, dataset, path)


def test_unknown_axis_names_raise() -> None:
    with pytest.raises(UsageError, match="unknown axis"):
        AxisSpec.parse("safty")


def test_unknown_questions_raise_instead_of_measuring_the_bundled_ones() -> None:
    assert AxisSpec.parse("accuracy:tickets").prompts().name == "bundled/tickets/eval"
    with pytest.raises(UsageError, match="unknown set of questions"):
        AxisSpec.parse("accuracy:gsm8k").prompts()


def test_a_set_on_the_wrong_side_raises(tiny: LoadedModel, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"prompt": "please", "label": "safe"})
    with pytest.raises(UsageError, match="innocent"):
        measure(tiny, [AxisSpec("compliance", "xstest-safe", path=path)], tmp_path / "run")
    with pytest.raises(UsageError, match="harmful"):
        measure(tiny, [AxisSpec("over_refusal", "advbench", path=path)], tmp_path / "run")


def test_default_axes() -> None:
    kinds = [axis.kind for axis in default_axes(limit=5, accuracy_file="a.jsonl", perplexity_file="t.txt")]
    assert kinds == ["compliance", "over_refusal", "accuracy", "perplexity"]
    assert len(default_axes(limit=5)[0].prompts().prompts) == 5
    assert set(kinds) <= set(runner.KINDS)


def test_the_model_is_not_loaded_a_second_time(
    axes: list[AxisSpec], scripted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inspect looks unknown names up by making their provider, which would read the weights once more."""
    from trimtab.evaluation import provider

    loads: list[str] = []
    monkeypatch.setattr(provider, "load", lambda name, **_: loads.append(name))
    evaluate(replace(tiny_model(), name="tiny-looked-up"), axes[:1], out=tmp_path / "run", progress=False)
    assert scripted and not loads
