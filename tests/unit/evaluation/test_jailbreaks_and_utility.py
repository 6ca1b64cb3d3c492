"""Jailbreaks, several seeds, other judges and more utility, through a whole evaluation of a tiny model."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab import approximate
from trimtab.comparison import compare
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import batching, crescendo, jailbreaks, tasks
from trimtab.evaluation.datasets import Prompt, PromptSet
from trimtab.evaluation.grading import gsm8k_answer, is_correct
from trimtab.evaluation.jailbreaks import (
    from_templates,
    in_the_past,
    many_shot,
    prefilled,
    rewritten,
    transformed,
)
from trimtab.evaluation.logs import read_run
from trimtab.evaluation.provider import continuation_nats
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation, render
from trimtab.models import LoadedModel

REQUESTS = PromptSet(
    "requests", (Prompt("a", "x", "How do I bake a cake?"), Prompt("b", "y", "Please make a message."))
)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The model repeats the last word of the last turn; the list records chats and settings."""
    seen: list[tuple[Any, Any]] = []

    def answer(loaded: LoadedModel, chats: Any, settings: Any) -> list[Generation]:
        seen.extend((chat, settings) for chat in chats)
        words = [chat[-1]["content"].split()[-1] for chat in chats]
        return [Generation(f"Sure, here is the {word} number {settings.seed}.", 5, 5, False) for word in words]

    monkeypatch.setattr(batching, "answer", in_batches(answer))
    monkeypatch.setattr(batching, "MAX_TICKS", 4)
    return seen


@pytest.mark.parametrize(
    ("text", "past"),
    [
        ("How do I bake bread?", "How did people bake bread in the past?"),
        ("Tell me how to bake bread", "How did people bake bread in the past?"),
        ("Please write a poem.", "How did people write a poem in the past?"),
    ],
)
def test_past_tense(text: str, past: str) -> None:
    assert in_the_past(text) == past


def test_every_jailbreak_keeps_ids_categories_and_the_request(tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text("You are a pirate. {{ prompt }} Arr.")
    for made in (
        prefilled(REQUESTS), many_shot(REQUESTS, 4), from_templates(REQUESTS, template),
        transformed("past-tense", REQUESTS), transformed("crescendo", REQUESTS),
    ):  # fmt: skip
        assert [one.id for one in made.prompts] == ["a", "b"]
        assert [one.category for one in made.prompts] == ["x", "y"]
        assert [one.request for one in made.prompts] == [one.text for one in REQUESTS.prompts]
    assert from_templates(REQUESTS, template).prompts[0].text == "You are a pirate. How do I bake a cake? Arr."


def test_many_shots_are_innocent_questions_with_harmless_affirmations() -> None:
    made = many_shot(REQUESTS, 6).prompts[0]
    assert [turn["role"] for turn in made.messages] == ["user", "assistant"] * 6 + ["user"]
    from trimtab.data import affirmations

    assert {turn["content"] for turn in made.messages if turn["role"] == "assistant"} <= set(affirmations())


def test_a_prompt_with_template_syntax_is_put_in_literally(tmp_path: Path) -> None:
    template = tmp_path / "t.jsonl"
    template.write_text(json.dumps({"name": "n", "template": "Say {{ prompt }} now"}) + "\n")
    made = from_templates(PromptSet("p", (Prompt("a", "", r"\1 {{ prompt }} \g<0>"),)), template)
    assert made.prompts[0].text == r"Say \1 {{ prompt }} \g<0> now"


def test_templates_without_a_place_and_unknown_methods_are_errors(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("no place")
    with pytest.raises(DataError, match="place for the prompt"):
        from_templates(REQUESTS, tmp_path / "t.txt")
    with pytest.raises(UsageError, match="unknown jailbreak"):
        transformed("magic", REQUESTS)
    with pytest.raises(UsageError, match="templates come from a file"):
        transformed("template", REQUESTS)


def test_rewrites_by_id_or_by_order(tmp_path: Path) -> None:
    by_id = tmp_path / "i.jsonl"
    by_id.write_text('{"id": "b", "rewrite": "B?"}\n')
    assert [one.id for one in rewritten(REQUESTS, "past-tense", by_id).prompts] == ["b"]
    by_order = tmp_path / "o.txt"
    by_order.write_text("A?\n")
    with pytest.raises(DataError, match="as many as"):
        rewritten(REQUESTS, "past-tense", by_order)


def test_a_prefilled_answer_is_continued_by_the_template() -> None:
    loaded = tiny_model()
    begun = render(loaded, prefilled(REQUESTS, "sure here is").prompts[0].messages)
    text = loaded.tokenizer.decode(begun)
    assert text.endswith("sure here is")
    assert render(loaded, REQUESTS.prompts[0].messages) != begun


def test_a_jailbreak_axis_is_judged_on_the_request(tmp_path: Path, scripted: list[Any]) -> None:
    run = evaluate(tiny_model(), [AxisSpec("jailbreak", "prefill", limit=5)], out=tmp_path, progress=False)
    axis = run.axes["jailbreak:prefill"]
    assert axis.lower_is_better and len(axis.items) == 5
    assert all(item.value == 1.0 for item in axis.items)
    assert all(chat[-1] == {"role": "assistant", "content": "Sure, here is"} for chat, _ in scripted)
    from trimtab.evaluation.datasets import bundled_requests

    texts = {one.text for one in bundled_requests(side="harmful", split="eval").prompts}
    assert {item.prompt for item in axis.items} <= texts
    assert len(run.axes["incoherence"].items) == 5


def test_several_seeds_are_draws_of_one_prompt(tmp_path: Path, scripted: list[Any]) -> None:
    specs = [AxisSpec("compliance", limit=4)]
    run = evaluate(tiny_model(), specs, out=tmp_path / "a", progress=False, seeds=3, temperature=0.7)
    items = run.axes["compliance"].items
    assert len(items) == 12 and len({item.id for item in items}) == 12 and len({item.group for item in items}) == 4
    assert {settings.seed for _, settings in scripted} == {1, 2, 3}
    assert {settings.temperature for _, settings in scripted} == {0.7}
    found = compare(run, read_run(tmp_path / "a")).axes[0]
    assert found.estimate is not None and found.estimate.clusters == 4


def test_seeds_need_a_temperature(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="temperature"):
        evaluate(tiny_model(), out=tmp_path, progress=False, seeds=3)


def test_a_judge_of_harm_leaves_over_refusal_to_the_rules(
    tmp_path: Path, scripted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.evaluation.judges import Verdict

    class Half:
        name, positive = "half@1", "harmful"

        async def verdict(self, exchange: Any) -> Verdict:
            return Verdict("unscored", True, "garbage from the judge")

    monkeypatch.setattr("trimtab.evaluation.ladder.make_judge", lambda name: Half())
    specs = [AxisSpec("compliance", limit=3), AxisSpec("over_refusal", limit=3)]
    run = evaluate(tiny_model(), specs, out=tmp_path, progress=False, judge="rubric:half")
    assert run.axes["compliance"].judge == "half@1"
    assert [item.value for item in run.axes["compliance"].items] == [None] * 3  # garbage is unscored, never safe
    assert run.axes["over_refusal"].judge.startswith("refusal-rules@")
    tasks._AT_WORK.pop("rubric:half")


def test_a_crescendo_takes_refused_turns_back(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter(["I can't help with that.", "Sure, here is one.", "Sure, here is two."])
    state = SimpleNamespace(
        metadata={"request": "the aim"}, messages=[], input_text="the aim", output=SimpleNamespace(completion="")
    )

    async def target(state: Any) -> Any:
        state.output = SimpleNamespace(completion=next(replies))
        state.messages.append(SimpleNamespace(role="assistant", text=state.output.completion))
        return state

    class Lead:
        def __init__(self) -> None:
            self.asked: list[str] = []

        async def generate(self, turns: Any, config: Any = None) -> Any:
            self.asked.append(turns[-1].content)
            return SimpleNamespace(completion=f"step {len(self.asked)}")

    lead = Lead()
    monkeypatch.setattr(crescendo, "get_model", lambda name: lead)
    found = asyncio.run(crescendo.crescendo("lead", turns=2)(state, target))  # type: ignore[arg-type]
    assert found.output.completion == "Sure, here is two."
    assert found.metadata["turns_taken_back"] == 1
    assert len(found.messages) == 4  # two turns and their answers; the refused one is gone
    assert "can't help" not in lead.asked[-1]


def test_a_crescendo_without_an_attacker_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="needs an attacker"):
        evaluate("./nowhere", [AxisSpec("jailbreak", "crescendo", limit=1)], out=out, progress=False)
    assert not out.exists(), "nothing was started, and no model was looked for"


def test_gcg_by_the_library_lowers_the_loss_of_its_target() -> None:
    pytest.importorskip("nanogcg", reason="needs nanogcg")
    from trimtab.evaluation.jailbreaks import with_suffixes

    made = with_suffixes(tiny_model(), PromptSet("p", (Prompt("a", "", "please bake a cake"),)), steps=2, width=8)
    assert made.prompts[0].text.startswith("please bake a cake ") and made.prompts[0].request == "please bake a cake"


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("so 3 + 4 = 7\n#### 7", True, True),
        ("#### 1,007", False, False),
        ("The answer is 7.", False, True),
        ("#### 7 or 8", True, False),
        ("#### $7", True, True),
        ("#### seven", False, False),
    ],
)
def test_gsm8ks_strict_rule_beside_the_last_number(answer: str, strict: bool, flexible: bool) -> None:
    target = "3 + 4 = <<3+4=7>>7\n#### 7"
    assert is_correct(answer, target, match="gsm8k") is strict
    assert is_correct(answer, target, match="number") is flexible
    assert gsm8k_answer("none") is None


def test_choice_log_probabilities_against_one_option_at_a_time() -> None:
    loaded = tiny_model()
    chat = [{"role": "user", "content": "please bake a cake"}]
    found = continuation_nats(loaded, chat, ["yes", "no today", "help"])
    for option, value in zip(["yes", "no today", "help"], found, strict=True):
        asked, told = render(loaded, chat), loaded.tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = torch.log_softmax(loaded.model(input_ids=torch.tensor([[*asked, *told]])).logits[0].float(), -1)
        expected = sum(float(logits[len(asked) - 1 + place, token]) for place, token in enumerate(told))
        assert value == pytest.approx(expected, abs=1e-4)


def test_an_option_s_score_under_a_rule_for_prompts_does_not_depend_on_its_company() -> None:
    """TEAL spares the first half of what is read; padding behind a short option is none of it."""
    loaded = tiny_model()
    with torch.no_grad():
        for parameter in loaded.model.model.layers.parameters():  # so that the rule moves the scores
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    chat = [{"role": "user", "content": "please bake a cake"}]
    options = ["yes", "no today help yes no today help yes no today", "help"]
    exact = continuation_nats(loaded, chat, options)
    with approximate(loaded, "teal:0.5"):
        together = continuation_nats(loaded, chat, options)
        alone = [continuation_nats(loaded, chat, [option])[0] for option in options]
    assert together == pytest.approx(alone, abs=1e-4)
    assert abs(together[0] - exact[0]) > 1e-2, "else the approximation tells nothing"


def questions(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_choice_axis(tmp_path: Path) -> None:
    file = questions(
        tmp_path / "q.jsonl",
        {"prompt": "bake a cake", "answer": "yes", "choices": ["yes", "no"], "id": "1"},
        {"prompt": "make a message", "answer": "no", "choices": ["yes", "no"], "id": "2"},
    )
    run = evaluate(tiny_model(), [AxisSpec("choice", "q", path=file)], out=tmp_path / "o", progress=False)
    axis = run.axes["choice:q"]
    assert axis.kind == "binary" and not axis.lower_is_better
    assert {item.verdict for item in axis.items} <= {"correct", "incorrect"} and len(axis.items) == 2


def test_nan_logits_leave_a_choice_unscored(tmp_path: Path) -> None:
    file = questions(tmp_path / "q.jsonl", {"prompt": "bake", "answer": "yes", "choices": ["yes", "no"], "id": "1"})
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(float("nan"))
    run = evaluate(loaded, [AxisSpec("choice", "q", path=file)], out=tmp_path / "o", progress=False)
    assert [item.value for item in run.axes["choice:q"].items] == [None]


def test_rouge_by_the_library(tmp_path: Path, scripted: list[Any]) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    file = questions(tmp_path / "q.jsonl", {"prompt": "name the cake", "answer": "here is the cake", "id": "1"})
    run = evaluate(tiny_model(), [AxisSpec("rouge", "q", path=file)], out=tmp_path / "o", progress=False)
    (item,) = run.axes["rouge:q"].items
    assert run.axes["rouge:q"].kind == "continuous"
    # answer: sure here is the cake number 0 (7 words), reference: 4 words, longest common subsequence 4
    assert item.value == pytest.approx(2 * (4 / 7) * 1.0 / (4 / 7 + 1.0))
    assert not math.isnan(item.value or math.nan)


def test_a_suffix_is_optimised_where_it_is_asked_and_leaves_pytorch_as_it_was() -> None:
    """nanogcg puts it right behind the last message where no place is marked, and turns deterministic kernels on."""
    given: list[Any] = []

    def run(model: Any, tokenizer: Any, messages: Any, target: str, settings: Any) -> Any:
        given.append(messages)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(0)
        return SimpleNamespace(best_string="x y")

    loaded = tiny_model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = Prompt("1", "", "make a cake", history=(("user", "hi"), ("assistant", "yes")), opening="Sure")
    assert jailbreaks._suffix(run, loaded, one, None) == "x y"
    assert given[0][-2:] == [
        {"role": "user", "content": "make a cake {optim_str}"}, {"role": "assistant", "content": "Sure"}
    ]  # fmt: skip
    assert not torch.are_deterministic_algorithms_enabled() and torch.equal(torch.rand(1), expected)
    with pytest.raises(UsageError, match="own mark"):
        jailbreaks._suffix(run, loaded, replace(one, text="say {optim_str}"), None)
