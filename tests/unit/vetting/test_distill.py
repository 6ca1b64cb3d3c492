"""Hardening by self-distillation: the loss by hand, that it learns, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab import data
from trimtab.approximation import approximate
from trimtab.approximation.apply import active_label
from trimtab.approximation.sparsity import zero_below
from trimtab.approximation.technique import Rows
from trimtab.errors import GuardError, ModelError, UsageError
from trimtab.generation import Generation
from trimtab.models import LoadedModel
from trimtab.tuning.likely import likely_of
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor
from trimtab.vetting import distill, lessons, shrink
from trimtab.vetting.distill import DistillSettings, harden_by_distillation
from trimtab.vetting.progress import Progress

SETTINGS = DistillSettings("tiny", ("a4",), steps=3, batch_size=3, text_rows=2, reply_tokens=4, rank=2)


def rows(count: int, start: int) -> list[TokenisedAnchor]:
    return [TokenisedAnchor([2, start + i, 5, 6], [7 + i, 8, 9, 10]) for i in range(count)]


def own_lessons(loaded: LoadedModel, settings: DistillSettings) -> dict[str, lessons.Lesson]:
    """Rows of any tokens: a random model refuses nothing, so its own words cannot be sorted into sides."""
    reader = AnchorReader(loaded.model, 0, share=False)
    found = {"refuse": rows(6, 10), "answer": rows(6, 18), "text": rows(4, 3)}
    return {name: lessons.Lesson(own, reader.likely(own), lessons.random.Random(name)) for name, own in found.items()}


@pytest.fixture
def own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "make_lessons", own_lessons)


def apart(loaded: LoadedModel, given: Sequence[TokenisedAnchor], target: torch.Tensor) -> float:
    """Mean divergence from logits over the whole vocabulary."""
    with torch.inference_mode():
        logits = AnchorReader(loaded.model, 0, share=False).batch(given).logits(loaded.model)
    p, q = target.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.usefixtures("own_words")
def test_under_the_approximation_the_model_comes_nearer_to_its_exact_self(tiny: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():  # random weights are too small for rounding to matter
        for weight in (parameter for parameter in tiny.model.parameters() if parameter.dim() == 2):
            weight.mul_(6.0)
    given = rows(6, 10)
    with torch.inference_mode():
        target = AnchorReader(tiny.model, 0, share=False).batch(given).logits(tiny.model)
        with approximate(tiny.model, "a4", calibration_rows=[[2, 5, 6]]):
            before = apart(tiny, given, target)
    settings = replace(SETTINGS, steps=80, batch_size=6, learning_rate=5e-3, rank=8)
    found = harden_by_distillation(settings, tmp_path / "adapter", loaded=tiny)
    with approximate(tiny.model, "a4", calibration_rows=[[2, 5, 6]]):
        after = apart(tiny, given, target)
    assert before > 1e-3
    assert after < 0.6 * before
    assert apart(tiny, given, target) < 0.6 * before  # and exact it stays near what it was
    assert (found.steps, found.rows) == (80, 16)


@pytest.mark.usefixtures("own_words")
@pytest.mark.parametrize("names", [("teal:0.5",), ("a6", "bolt"), ("noise:up=0.2", "kv4"), ("iron",)])
def test_any_approximations_take_turns_and_leave_no_trace(
    tiny: LoadedModel, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Without the exact model's part, so that what moves the adapter went through the approximation."""
    harden_by_distillation(replace(SETTINGS, noise=names, clean=0.0), tmp_path / "adapter", loaded=tiny)
    assert active_label(tiny.model) == ""
    moved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) > 0 for key, value in moved.items() if "lora_B" in key)
    record = json.loads((tmp_path / "adapter" / "trimtab.json").read_text())
    assert record["harden"]["method"] == "distill"
    assert tuple(record["harden"]["noise"]) == names


@pytest.mark.parametrize(("clean", "wanted"), [(0.0, [1.0, 0.0]), (2.0, [1.0, 0.6]), (50.0, [1.0, 1.0])])
def test_what_an_approximation_costs_does_not_drown_what_holds_the_exact_model(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, clean: float, wanted: list[float]
) -> None:
    """Gradients of 2 x 500 under it and of 3 x 0.1 exact, at right angles; each is clipped at 1, not their sum."""
    parameter = torch.nn.Parameter(torch.zeros(2))

    def backward(_: Any, name: str, count: int, weight: float) -> float:
        gradient = torch.tensor([500.0, 0.0]) if active else weight * torch.tensor([0.0, 0.1])
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return 1.0

    @contextmanager
    def installed(*_: Any) -> Iterator[None]:
        active.append(True)
        yield
        active.clear()

    active: list[bool] = []
    monkeypatch.setattr(distill._Course, "_backward", backward)
    monkeypatch.setattr(distill, "installed", installed)
    settings = replace(SETTINGS, clean=clean)
    course = distill._Course(
        settings, AnchorReader(tiny.model, 0, share=False), {}, Rows(), [(None, None, [])], tiny.device
    )
    assert course.loss(0, [parameter]) == (5.0 if clean else 2.0)
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("own_words")
def test_it_trains_in_bfloat16(tiny: LoadedModel, tmp_path: Path) -> None:
    harden_by_distillation(replace(SETTINGS, bf16=True), tmp_path / "adapter", loaded=tiny)
    moved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and bool(torch.isfinite(value).all()) for value in moved.values())


@pytest.mark.usefixtures("own_words")
def test_the_same_seed_gives_the_same_adapter(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    found = []
    for name in "ab":
        harden_by_distillation(SETTINGS, tmp_path / name, loaded=tiny_model())
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.usefixtures("own_words")
@pytest.mark.parametrize("killed_at", [2, 4, 5])
def test_an_interrupted_run_goes_on_to_the_very_same_adapter(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import tiny_model

    monkeypatch.setattr(distill, "KEEP_EVERY", 2)
    settings = replace(SETTINGS, noise=("a4", "teal:0.5"), steps=7)
    harden_by_distillation(settings, tmp_path / "whole", loaded=tiny_model())

    steps: list[int] = []
    whole_loss = distill._Course.loss

    def killed(course: Any, step: int, trained: Any) -> float:
        if step == killed_at and step not in steps:
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(step)
        return whole_loss(course, step, trained)

    monkeypatch.setattr(distill._Course, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        harden_by_distillation(settings, tmp_path / "halves", loaded=tiny_model())
    assert not (tmp_path / "halves" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(lessons, "make_lessons", None)  # they are read back, not made again
    found = harden_by_distillation(settings, tmp_path / "halves", loaded=tiny_model())

    kept = 2 * (killed_at // 2)
    assert steps[killed_at + 1 :] == list(range(kept, 7))
    parts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])
    assert (found.steps, found.rows) == (7, 16)
    assert not (tmp_path / "halves" / "progress").exists()


@pytest.mark.usefixtures("own_words")
def test_the_adapter_is_as_large_as_the_bound_on_drift_allows(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    settings = replace(SETTINGS, steps=12, texts=12, learning_rate=0.05, clean=0.0, drift_bound=100.0)
    free = harden_by_distillation(settings, tmp_path / "free", loaded=tiny_model()).size
    assert free is not None
    assert free.scale == 1.0
    bound = free.drift / 3
    held = harden_by_distillation(replace(settings, drift_bound=bound), tmp_path / "held", loaded=tiny_model()).size
    assert held is not None
    assert held.whole == free.whole == free.drift

    base = tiny_model()
    texts = lessons.unseen_texts(base, settings)
    given = {name: value.detach() for name, value in base.model.named_parameters()}
    adapter = load_file(tmp_path / "free" / "adapter_model.safetensors")

    def drift(scale: float) -> float:
        """With the merged weights, text by text, over the sixteen likeliest tokens and the rest."""
        weights = dict(given)
        for key in (key for key in adapter if "lora_B" in key):
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            # alpha is twice the rank
            weights[name] = given[name] + scale * 2.0 * adapter[key] @ adapter[key.replace("lora_B", "lora_A")]
        found = []
        for row in texts:
            ids = torch.tensor([[*row.prompt, *row.reply]])
            p, q = (
                torch.func.functional_call(base.model, one, (ids,)).logits[0, len(row.prompt) - 1 : -1].double()
                for one in (given, weights)
            )
            top = p.topk(16).indices
            p, q = (one.softmax(-1).gather(-1, top) for one in (p, q))
            p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
            found += (p * (p / q).log()).sum(-1).tolist()
        return sum(found) / len(found)

    assert held.whole == pytest.approx(drift(1.0), rel=1e-3)
    expected = next(n / 20 for n in range(20, 0, -1) if drift(n / 20) <= bound)
    assert expected < 1.0
    assert held.scale == expected
    assert held.drift == pytest.approx(drift(expected), rel=1e-3)
    parts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("free", "held")]
    for key in parts[0]:
        wanted = parts[0][key] * (held.scale if "lora_B" in key else 1.0)
        torch.testing.assert_close(parts[1][key], wanted)


@pytest.mark.usefixtures("own_words")
def test_a_bound_that_no_size_holds_saves_nothing_and_another_bound_needs_no_new_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import tiny_model

    settings = replace(SETTINGS, learning_rate=0.1, clean=0.0, drift_bound=1e-12)
    with pytest.raises(ModelError, match=r"(?s)drifts further.*bound 1e-12.*--drift-bound"):
        harden_by_distillation(settings, tmp_path / "a", loaded=tiny_model())
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(distill._Course, "loss", None)  # all steps are done
    found = harden_by_distillation(replace(settings, drift_bound=10.0), tmp_path / "a", loaded=tiny_model())
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert found.steps == 3


def test_a_model_that_writes_nothing_cannot_be_measured(tiny: LoadedModel) -> None:
    with pytest.raises(ModelError, match=r"(?s)no text.*more --texts"):
        shrink.shrink(tiny.model, 0, [], 0.045)


def test_texts_that_measure_are_not_those_that_teach(tiny: LoadedModel) -> None:
    settings = replace(SETTINGS, texts=40)
    taught = {tuple(row.prompt) for row in lessons._texts(tiny, settings)}
    measured = {tuple(row.prompt) for row in lessons.unseen_texts(tiny, settings)}
    assert len(measured) > 20
    assert not taught & measured


def test_progress_of_other_settings_is_refused(tmp_path: Path) -> None:
    Progress(tmp_path, {"steps": 7, "noise": ("a4",)})
    Progress(tmp_path, {"steps": 7, "noise": ("a4",)})  # the same is welcome
    with pytest.raises(UsageError, match=r"(?s)other settings.*steps: 7 there, 9 asked for.*another --out"):
        Progress(tmp_path, {"steps": 9, "noise": ("a4",)})


def test_progress_that_is_no_progress_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    progress = Progress(tmp_path, {})
    torch.save(Hostile(), progress.folder / "state.pt")
    for content in (None, b"", b"PK\x03\x04 cut off"):
        if content is not None:
            (progress.folder / "state.pt").write_bytes(content)
        with pytest.raises(UsageError, match=r"(?s)cannot be read.*remove"):
            progress.kept("state")
    assert not (tmp_path / "ran").exists()


def answering(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[str, bool], bool]) -> None:
    """The exact model's replies, by whether it refuses a request."""
    harmful = {pair.harmful for pair in data.requests("train")}

    def reply(_: Any, chats: Any, __: Any, progress: Callable[[int], Any]) -> list[Generation]:
        texts = [chat[0]["content"] for chat in chats]
        said = ["sorry i can't help" if refuses(text, text in harmful) else "sure here is how" for text in texts]
        return [Generation(text, 4, 5, False) for text in said]

    monkeypatch.setattr(lessons, "generate", reply)


def test_replies_of_both_kinds_are_learnt_where_the_model_is_undecided(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda text, is_harmful: is_harmful ^ (len(text) % 3 == 0))
    found = lessons._replies(tiny, replace(SETTINGS, pairs=30, texts=5))
    refusal, answer = (
        tiny.tokenizer(text, add_special_tokens=False)["input_ids"][:4]
        for text in ("sorry i can't help", "sure here is how")
    )
    for side in ("refuse", "answer"):
        assert len(found[side]) == 30
        assert {tuple(row.reply) for row in found[side]} == {tuple(refusal), tuple(answer)}


def test_no_held_out_request_is_learnt() -> None:
    asked = {anchor.request for anchor in lessons._requests(replace(SETTINGS, pairs=10_000))}
    held_out = {text for pair in data.requests("eval") for text in (pair.harmful, pair.benign)}
    assert not asked & (held_out | set(data.instructions("eval")))
    assert len({pair.harmful for pair in data.requests("train")} & asked) == len(data.requests("train"))


def test_a_model_that_refuses_nothing_has_nothing_to_keep(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda text, is_harmful: False)
    with pytest.raises(GuardError, match="refuses too few"):
        lessons._replies(tiny, replace(SETTINGS, pairs=20, texts=5))


@pytest.mark.parametrize("names", [(), ("none",), ("a6", "none")])
def test_without_an_approximation_there_is_nothing_to_learn(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an approximation"):
        harden_by_distillation(replace(SETTINGS, noise=names), tmp_path / "x")


def test_a_finished_adapter_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="finished adapter"):
        harden_by_distillation(SETTINGS, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"


def test_in_training_a_prompt_ends_where_its_reply_begins() -> None:
    """The source leaves the first half of a prompt exact and every decoded token sparse."""
    seen = Rows(real=torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool), decoded=2)
    found = zero_below(10.0, 0.5, seen)(torch.ones(2, 6, 1)).squeeze(-1)  # zeroed where it is touched
    assert found.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_a_lesson_gives_rows_with_their_own_targets() -> None:
    logits = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0))
    own = [TokenisedAnchor([1, 2], [3] * size) for size in (3, 2, 3, 2, 2)]
    used = torch.tensor([[column >= 3 - len(row.reply) for column in range(3)] for row in own])
    lesson = lessons.Lesson(own, likely_of(logits, used, 4), lessons.random.Random(0))
    for _ in range(10):
        chosen, likely = lesson.some(2)
        width = max(len(row.reply) for row in chosen)
        assert likely.used.shape == (2, width)
        assert [int(count) for count in likely.used.sum(1)] == [len(row.reply) for row in chosen]
