"""The inspect provider on a tiny model: batches, settings, errors."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from inspect_ai.model import ChatMessageUser, ContentImage, GenerateConfig
from inspect_ai.tool import ToolInfo

from trimtab import generation
from trimtab.errors import DataError, UsageError
from trimtab.evaluation import batching
from trimtab.evaluation.provider import cut_at, likelihood, output_from, plain_messages, provider_for, settings_from
from trimtab.generation import Generation, GenerationSettings, generate
from trimtab.models import LoadedModel

SHORT = GenerateConfig(max_tokens=4, temperature=0.0)


def ask(model: Any, texts: list[str], config: GenerateConfig = SHORT) -> list[Any]:
    async def together() -> list[Any]:
        calls = [model.api.generate([ChatMessageUser(content=text)], [], "none", config) for text in texts]
        return await asyncio.gather(*calls)

    return asyncio.run(together())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each taking gave."""
    sizes: list[int] = []

    def counted(loaded: LoadedModel, take: Any, done: Any, settings: GenerationSettings) -> None:
        def taking(count: int) -> Any:
            found = take(count)
            assert all(prompt.key.settings == settings for prompt in found)
            sizes.extend([len(found)] if found else [])
            return found

        generation.answer(loaded, taking, done, settings)

    monkeypatch.setattr(batching, "answer", counted)
    return sizes


def test_concurrent_calls_share_batches_and_keep_their_answers(tiny: LoadedModel, batches: list[int]) -> None:
    texts = ["please help", "bake a cake", "how is the weather today", "route this message", "steal second base"] * 4
    model = provider_for(tiny, batch_size=8)
    outputs = ask(model, texts)
    assert sum(batches) == 20 and max(batches) <= 8
    chats = [[{"role": "user", "content": text}] for text in texts]
    expected = generate(tiny, chats, GenerationSettings(max_new_tokens=4, batch_size=8))
    assert [output.completion for output in outputs] == [answer.text for answer in expected]


def test_another_event_loop_works_on_the_same_model(tiny: LoadedModel, batches: list[int]) -> None:
    model = provider_for(tiny)
    first, second = ask(model, ["please help"] * 3), ask(model, ["please help"] * 3)
    assert [o.completion for o in first] == [o.completion for o in second]
    assert sum(batches) == 6


def test_a_run_that_is_not_over_takes_nothing_from_the_next_event_loop(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread asks for more after the first loop has ended and the second has asked."""
    late: list[int] = []

    def lingering(loaded: LoadedModel, take: Any, done: Any, settings: GenerationSettings) -> None:
        generation.answer(loaded, take, done, settings)
        time.sleep(0.5)
        more = take(8)
        late.append(len(more))
        for prompt in more:
            done(prompt, Generation("late", 1, 1, False))

    monkeypatch.setattr(batching, "answer", lingering)
    model = provider_for(tiny)

    async def limited() -> list[Any]:
        calls = [model.api.generate([ChatMessageUser(content="please help")], [], "none", SHORT) for _ in range(3)]
        return await asyncio.wait_for(asyncio.gather(*calls), timeout=30)

    first, second = asyncio.run(limited()), asyncio.run(limited())
    assert [o.completion for o in first] == [o.completion for o in second]
    assert late[0] == 0


def test_different_settings_never_share_a_batch(tiny: LoadedModel, batches: list[int]) -> None:
    model = provider_for(tiny)

    async def together() -> list[Any]:
        configs = [SHORT, GenerateConfig(max_tokens=2, temperature=0.0)] * 3
        calls = [model.api.generate([ChatMessageUser(content="please help")], [], "none", c) for c in configs]
        return await asyncio.gather(*calls)

    outputs = asyncio.run(together())
    assert sum(batches) == 6 and len(batches) > 1
    assert all(output.usage.output_tokens <= 2 for output in outputs[1::2])


def test_progress_counts_every_answer(tiny: LoadedModel) -> None:
    seen: list[int] = []
    ask(provider_for(tiny, batch_size=2, on_answers=seen.append), ["please help"] * 5)
    assert sum(seen) == 5


def test_expected_chats_are_waited_for(tiny: LoadedModel, batches: list[int]) -> None:
    model = provider_for(tiny, expected=4)

    async def late(seconds: float) -> Any:
        await asyncio.sleep(seconds)
        return await model.api.generate([ChatMessageUser(content="please help")], [], "none", SHORT)

    async def together() -> None:
        await asyncio.gather(late(0), late(0), late(0.1), late(0.2))

    asyncio.run(together())
    assert batches == [4]


def test_an_error_reaches_every_caller_and_the_next_batch_still_runs(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = provider_for(tiny)

    def broken(*args: Any) -> Any:
        raise DataError("no")

    monkeypatch.setattr(batching, "answer", broken)
    with pytest.raises(DataError):
        ask(model, ["please help"])
    monkeypatch.setattr(batching, "answer", generation.answer)
    assert len(ask(model, ["please help"])) == 1


def test_context_overflow_ends_that_chat_only(tiny: LoadedModel) -> None:
    long, short = ask(provider_for(tiny), ["please " * 200, "please help"])
    assert long.stop_reason == "model_length"
    assert long.completion == ""
    assert "context of 128" in long.error
    assert short.stop_reason in ("stop", "max_tokens")


def test_sampling_repeats_with_its_seed(tiny: LoadedModel) -> None:
    hot = GenerateConfig(max_tokens=12, temperature=2.0, seed=5)
    first, again = (ask(provider_for(tiny), ["please help"], hot)[0].completion for _ in range(2))
    other = ask(provider_for(tiny), ["please help"], hot.model_copy(update={"seed": 6}))[0].completion
    assert first == again
    assert first != other


def test_settings_default_to_greedy() -> None:
    assert settings_from(GenerateConfig(), 3) == GenerationSettings(max_new_tokens=256, temperature=0.0, batch_size=3)


def test_stop_sequences_cut_the_text() -> None:
    assert cut_at("one END two STOP", ["STOP", "END"]) == ("one ", True)
    assert cut_at("one two", ["x", ""]) == ("one two", False)
    output = output_from("m", Generation("a STOP b", 5, 3, truncated=True), ["STOP"])
    assert (output.completion, output.stop_reason) == ("a ", "stop")
    assert output_from("m", Generation("a", 5, 3, truncated=True), []).stop_reason == "max_tokens"


@pytest.mark.parametrize(
    "config", [GenerateConfig(top_k=3), GenerateConfig(num_choices=2), GenerateConfig(logprobs=True)]
)
def test_settings_that_would_be_ignored_raise(tiny: LoadedModel, config: GenerateConfig) -> None:
    with pytest.raises(UsageError, match="does not honour"):
        ask(provider_for(tiny), ["please help"], config)


def test_tools_and_images_raise(tiny: LoadedModel) -> None:
    model = provider_for(tiny)
    tool = ToolInfo(name="t", description="d")
    with pytest.raises(UsageError, match="tool"):
        asyncio.run(model.api.generate([ChatMessageUser(content="x")], [tool], "auto", SHORT))
    with pytest.raises(UsageError, match="text only"):
        plain_messages([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])])


def test_likelihood_is_the_loss_of_the_model(tiny: LoadedModel) -> None:
    import torch

    found = likelihood(tiny, "please help with a cake today")
    ids = [tiny.tokenizer.bos_token_id, *tiny.tokenizer("please help with a cake today")["input_ids"]]
    row = torch.tensor([ids])
    loss = tiny.model(input_ids=row, labels=row).loss.item()
    assert found.tokens == len(ids) - 1
    assert found.nats / found.tokens == pytest.approx(loss, rel=1e-5)


def test_likelihood_of_too_long_a_text_raises(tiny: LoadedModel) -> None:
    with pytest.raises(DataError, match="window"):
        likelihood(tiny, "please " * 300)


def test_the_model_keeps_the_user_s_name(tiny: LoadedModel) -> None:
    assert str(provider_for(tiny)) == "trimtab/tiny"
