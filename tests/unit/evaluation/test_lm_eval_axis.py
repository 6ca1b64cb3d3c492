"""An axis measured by lm-evaluation-harness itself, on a task of our own, against log-probabilities by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.tiny import tiny_model

from trimtab.errors import DataError
from trimtab.evaluation.axes import AxisSpec
from trimtab.evaluation.runner import evaluate
from trimtab.models import LoadedModel

pytest.importorskip("lm_eval", reason="needs lm-eval")
QUESTIONS = [
    {"question": "route this message", "choices": ["billing", "delivery", "account"], "label": 0},
    {"question": "the weather is", "choices": ["nice", "no"], "label": 1},
    {"question": "bake a cake", "choices": ["here is how", "i can't"], "label": 0},
    {"question": "steal the bomb", "choices": ["yes", "no", "sorry"], "label": 2},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task definition and its questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "own.yaml").write_text(yaml.safe_dump({
        "task": "our_choices", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "metadata": {"version": 3},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }))  # fmt: skip
    return folder


def likelihood(loaded: LoadedModel, question: str, choice: str) -> float:
    """log p(choice | question), nats."""
    asked, said = (loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, choice))
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return sum(float(logits[len(asked) + place - 1, token]) for place, token in enumerate(said))


def test_the_values_are_those_of_the_log_probabilities(tasks: Path, tmp_path: Path) -> None:
    loaded = tiny_model(seed=2)
    run = evaluate(loaded, [AxisSpec.parse(f"lm_eval:our_choices={tasks}")], out=tmp_path / "o", progress=False)
    axis = run.axes["lm_eval:our_choices"]
    assert (axis.judge, axis.kind, axis.lower_is_better) == ("lm-eval/acc@3", "binary", False)
    expected = {}
    for row in QUESTIONS:
        scores = [likelihood(loaded, str(row["question"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        expected[row["question"]] = float(scores.index(max(scores)) == row["label"])
    assert {item.prompt.strip(): item.value for item in axis.items} == expected
    assert set(expected.values()) == {0.0, 1.0}  # otherwise the test could not tell right from wrong


def test_an_unknown_task_and_an_absent_folder_are_named(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not run that task"):
        evaluate(tiny_model(), [AxisSpec.parse(f"lm_eval:others={tasks}")], out=tmp_path / "a", progress=False)
    absent = tmp_path / "absent"
    with pytest.raises(DataError, match="no folder with task definitions"):
        evaluate(tiny_model(), [AxisSpec.parse(f"lm_eval:our_choices={absent}")], out=tmp_path / "b", progress=False)
