from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import DataError, UsageError
from trimtab.evaluation.catalogue import BENIGN, CATALOGUE
from trimtab.evaluation.datasets import (
    Prompt,
    PromptSet,
    bundled_tickets,
    load_prompts,
    load_questions,
    ticket_system,
)

#: One line in each author's own layout, with harmless text.
LAYOUTS = {
    "advbench": ("advbench.csv", "goal,target\nBake a cake,Sure\n"),
    "harmbench": (
        "harmbench.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Bake a cake,contextual,food,,A recipe,b1\n",
    ),
    "jailbreakbench": ("jbb.csv", "Index,Goal,Target,Behavior,Category,Source\n7,Bake a cake,Sure,b,food,s\n"),
    "strongreject": ("sr.csv", "category,source,forbidden_prompt\nfood,custom,Bake a cake\n"),
    "malicious-instruct": ("mi.txt", "Bake a cake\n"),
    "hex-phi": ("hex.jsonl", '{"prompt": "Bake a cake", "category": "food"}\n'),
    "xstest-safe": ("xs.csv", "id,prompt,type,label,focus,note\n1,Bake a cake,t,safe,,\n2,No,t,unsafe,,\n"),
    "xstest-unsafe": ("xs.csv", "id,prompt,type,label,focus,note\n1,No,t,safe,,\n2,Bake a cake,t,unsafe,,\n"),
    "sorry-bench": (
        "sb.jsonl",
        '{"question_id": 1, "category": "food", "turns": ["Bake a cake"], "prompt_style": "base"}\n'
        '{"question_id": 1, "category": "food", "turns": ["bakeing a caek"], "prompt_style": "misspellings"}\n',
    ),
    "beavertails": (
        "bt.jsonl",
        '{"prompt": "Bake a cake", "response": "Sure", "category": {"food": true, "drink": false}, "is_safe": false}\n'
        '{"prompt": "Bake a cake", "response": "Yes", "category": {"food": true, "drink": false}, "is_safe": false}\n'
        '{"prompt": "Boil an egg", "response": "No", "category": {"food": false, "drink": false}, "is_safe": true}\n',
    ),
    "or-bench": ("or-bench-hard-1k.csv", "prompt,category\nBake a cake,food\n"),
    "or-bench-80k": ("or-bench-80k.csv", "prompt,category\nBake a cake,food\n"),
    "or-bench-toxic": ("or-bench-toxic.csv", "prompt,category\nBake a cake,food\n"),
    "jbb-benign": ("jbb.csv", "Index,Goal,Target,Behavior,Category,Source\n7,Bake a cake,Sure,b,food,s\n"),
    "do-not-answer": ("dna.jsonl", '{"question": "Bake a cake", "risk_area": "food", "id": 3}\n'),
}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked although a path was given")

    monkeypatch.setattr("trimtab.evaluation.datasets.from_hub", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_each_known_layout(tmp_path: Path, name: str) -> None:
    file, content = LAYOUTS[name]
    path = tmp_path / file
    path.write_text(content)
    found = load_prompts(name, path=path)
    assert len(found.prompts) == 1
    assert found.prompts[0].text.endswith("Bake a cake")
    assert found.prompts[0].messages[-1]["role"] == "user"
    assert found.label.startswith(f"{name}@sha256:")


def test_harmbench_context_stands_before_the_behaviour(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text(LAYOUTS["harmbench"][1])
    assert load_prompts("harmbench", path=path).prompts[0].text == "A recipe\n\n---\n\nBake a cake"


def test_any_file_of_prompts_with_a_name_of_its_own(tmp_path: Path) -> None:
    found = load_prompts("mine", path=lines(tmp_path / "p.jsonl", {"prompt": "Hi", "category": "c", "id": "k"}))
    assert found.prompts == (Prompt("k", "c", "Hi"),)


def test_bundled_sides_are_paired_by_id() -> None:
    harmful, benign = (load_prompts(side=side) for side in ("harmful", "benign"))
    assert [p.id for p in harmful.prompts] == [p.id for p in benign.prompts]
    assert len(harmful.prompts) >= 50
    train = {p.id for p in load_prompts(split="train").prompts}
    assert train.isdisjoint(p.id for p in harmful.prompts)


def test_bundled_tickets_have_choices() -> None:
    found = bundled_tickets(limit=20)
    assert all(prompt.target in prompt.choices for prompt in found.prompts)
    assert found.prompts[0].system == ticket_system(found.prompts[0].choices)


def test_limit_is_deterministic_nested_and_keeps_order(tmp_path: Path) -> None:
    found = load_prompts("mine", path=lines(tmp_path / "p.jsonl", *({"prompt": f"Question {n}"} for n in range(50))))
    ten, twenty = found.limited(10), found.limited(20)
    assert len(ten.prompts) == 10
    assert set(ten.prompts) < set(twenty.prompts)
    assert [p for p in found.prompts if p in set(ten.prompts)] == list(ten.prompts)
    assert ten == found.limited(10)
    assert found.limited(None) is found is found.limited(50)
    with pytest.raises(UsageError):
        found.limited(0)


def test_ids_without_an_id_column_survive_reordering(tmp_path: Path) -> None:
    rows = [{"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"}]
    first = load_prompts("m", path=lines(tmp_path / "1.jsonl", *rows)).prompts
    second = load_prompts("m", path=lines(tmp_path / "2.jsonl", *rows[::-1])).prompts
    assert len({p.id for p in first}) == 3
    assert {p.id for p in first} == {p.id for p in second}


def test_hash_changes_with_any_text() -> None:
    one = PromptSet("n", (Prompt("1", "", "a"),))
    assert one.sha256 != PromptSet("n", (Prompt("1", "", "b"),)).sha256
    assert one.sha256 != PromptSet("n", (Prompt("1", "", "a", system="s"),)).sha256
    assert len(one.sha256) == 16


@pytest.mark.usefixtures("no_hub")
def test_missing_column_names_those_seen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="words, other"):
        load_prompts("advbench", path=lines(tmp_path / "p.jsonl", {"words": "x", "other": 1}))


def test_empty_selection_and_unknown_names_raise(tmp_path: Path) -> None:
    only_unsafe = lines(tmp_path / "p.jsonl", {"prompt": "x", "label": "unsafe"})
    with pytest.raises(DataError, match="empty"):
        load_prompts("xstest-safe", path=only_unsafe)
    with pytest.raises(DataError, match="empty"):
        load_prompts(split="nowhere")
    with pytest.raises(UsageError, match="unknown set"):
        load_prompts("unheard-of")
    with pytest.raises(UsageError, match="side"):
        load_prompts(side="left")


def test_hub_failure_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match="download the file"):
        load_prompts("advbench")


def test_hub_rows_and_commit_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    class Info:
        sha = "0123456789abcdef"

    asked: dict[str, Any] = {}

    def fake_load(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.update(kwargs)
        return [{"prompt": "Bake a cake"}]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: Info())
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    found = load_prompts("advbench", revision="main")
    assert asked["revision"] == Info.sha
    assert found.label.startswith("advbench@0123456789ab@sha256:")


def test_questions_in_their_layouts(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl",
        {"prompt": "2+2?", "answer": 4},
        {"question": "Colour?", "label": "red", "choices": ["red", "blue"], "category": "c", "id": "k"},
        {"messages": [{"role": "user", "content": "Hi?"}], "completion": "Yes"},
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "A?"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "B?"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"prompt": "C?", "answer": "x", "choices": "x|y"},
    )
    first, second, third, fourth, fifth = load_questions(path).prompts
    assert (first.text, first.target) == ("2+2?", "4")
    assert (second.id, second.category, second.choices) == ("k", "c", ("red", "blue"))
    assert (third.text, third.target) == ("Hi?", "Yes")
    assert [m["role"] for m in fourth.messages] == ["system", "user", "assistant", "user"]
    assert (fourth.text, fourth.target) == ("B?", "b")
    assert fifth.choices == ("x", "y")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": "x"}, "prompt"),
        ({"prompt": "x"}, "answer"),
        ({"prompt": "x", "answer": "z", "choices": ["a"]}, "not among"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "malformed messages"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "x"}, "end with the user"),
    ],
)
def test_bad_questions_say_what_is_wrong(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_questions(lines(tmp_path / "q.jsonl", row))


@pytest.mark.shared_data
def test_the_authors_files(shared_data: Path) -> None:
    safety = shared_data / "safety"
    sizes = {
        "harmbench": ("harmbench/harmbench_behaviors_text_val.csv", 80),
        "jailbreakbench": ("jailbreakbench/harmful_behaviors_jailbreakbench.csv", 100),
        "strongreject": ("strongreject/strongreject_dataset.csv", 313),
        "malicious-instruct": ("malicious-instruct/malicious_instruct.txt", 100),
        "xstest-safe": ("xstest/xstest_prompts.csv", 250),
        "xstest-unsafe": ("xstest/xstest_prompts.csv", 200),
        "do-not-answer": ("do-not-answer", 939),
    }
    for name, (file, size) in sizes.items():
        if not (safety / file).exists():
            pytest.skip(f"{file} not found")
        assert len(load_prompts(name, path=safety / file).prompts) == size, name


def test_light_modules_import_without_torch() -> None:
    import subprocess

    modules = "judges, coherence, datasets, logs, summary, runner, verdicts, grading, windows"
    absent = "assert not {'torch', 'inspect_ai', 'transformers'} & set(sys.modules)"
    code = f"import sys\nfrom trimtab.evaluation import {modules}\n{absent}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_evaluation_set_of_beavertails_has_a_word_as_category(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "test.jsonl",
        {"prompt": "Bake a cake", "category": "food", "category_id": 0},
        {"prompt": "Boil an egg", "category": "drink", "category_id": 1},
    )
    found = load_prompts("beavertails", path=path)
    assert [(one.text, one.category) for one in found.prompts] == [("Bake a cake", "food"), ("Boil an egg", "drink")]


def test_labelled_answers_give_each_request_once_with_its_first_category(tmp_path: Path) -> None:
    marks = {"drink": False, "food": True, "garden": True}
    rows = [
        {"prompt": "Bake a cake", "response": f"{number}", "category": marks, "is_safe": number % 2 == 0}
        for number in range(4)
    ]
    found = load_prompts("beavertails", path=lines(tmp_path / "qa.jsonl", *rows))
    assert [(one.text, one.category) for one in found.prompts] == [("Bake a cake", "food")]


def test_a_conversation_of_several_turns_is_no_request(tmp_path: Path) -> None:
    path = lines(tmp_path / "sb.jsonl", {"question_id": 1, "turns": ["Bake", "a cake"], "prompt_style": "base"})
    with pytest.raises(DataError, match="several turns"):
        load_prompts("sorry-bench", path=path)


def test_innocent_sets_are_known_as_such() -> None:
    assert {"or-bench", "or-bench-80k", "jbb-benign", "xstest-safe"} == BENIGN
    assert set(CATALOGUE) >= BENIGN


def test_a_folder_of_mmlu_files_is_one_set_with_subjects(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    (folder / "cooking_test.csv").write_text(head + "What rises?,Salt,Yeast,Sugar,Milk,1\nHow many eggs?,3,2,1,0,3\n")
    (folder / "garden_test.csv").write_text(head + "What grows?,Grass,Stone,Glass,Iron,0\n")
    found = load_questions(folder).prompts
    assert [(one.target, one.category) for one in found] == [
        ("Yeast", "cooking_test"), ("0", "cooking_test"), ("Grass", "garden_test")
    ]  # fmt: skip
    assert found[1].choices == ("3", "2", "1", "0")  # the answer 3 is a place, though there is an option "3"


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"choices": ["Salt", "Yeast"], "answer": 1}, "Yeast"),
        ({"choices": ["Salt", "Yeast"], "answer": "B"}, "Yeast"),
        ({"choices": ["Salt", "Yeast"], "answer": "Salt"}, "Salt"),
        ({"choices": ["0", "1"], "answer": "1"}, "1"),
        ({"choices": ["A", "B", "no"], "answer": "B"}, "B"),
        ({"choices": {"text": ["Salt", "Yeast"], "label": ["1", "2"]}, "answer": "2"}, "Yeast"),
        ({"choices": {"A": "Salt", "B": "Yeast"}, "answer": "B"}, "Yeast"),
        ({"choices": "Salt | Yeast", "answer": "Yeast"}, "Yeast"),
        ({"A": "Salt", "B": "Yeast", "C": "", "answer": "B"}, "Yeast"),
    ],
)
def test_options_in_the_usual_layouts(tmp_path: Path, row: dict[str, Any], target: str) -> None:
    found = load_questions(lines(tmp_path / "q.jsonl", {"question": "What rises?", **row})).prompts[0]
    assert found.target == target
    assert len(found.choices) >= 2


def test_an_answer_that_is_no_option_is_an_error(tmp_path: Path) -> None:
    for answer in ("C", 2, "Milk", True):
        path = lines(tmp_path / "q.jsonl", {"question": "What rises?", "choices": ["Salt", "Yeast"], "answer": answer})
        with pytest.raises(DataError, match="not among the choices"):
            load_questions(path)


@pytest.mark.shared_data
def test_the_authors_own_utility_files(shared_data: Path) -> None:
    mmlu = load_questions(shared_data / "utility" / "mmlu" / "test")
    assert len(mmlu.prompts) > 10_000
    assert all(len(one.choices) == 4 and one.target in one.choices for one in mmlu.prompts)
    assert len({one.category for one in mmlu.prompts}) >= 50
    gsm8k = load_questions(shared_data / "utility" / "gsm8k" / "test.jsonl", limit=20)
    assert all("####" in one.target for one in gsm8k.prompts)
    dialogues = load_questions(shared_data / "utility" / "dialogsum" / "dev.jsonl", limit=5)
    assert all(one.target for one in dialogues.prompts)
