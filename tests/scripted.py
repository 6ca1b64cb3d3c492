"""A model whose answers a test writes: stands in for ``batching.answer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.generation import Generation, GenerationSettings, Message

Answers = Callable[[Any, Sequence[Sequence[Message]], GenerationSettings], list[Generation]]


def in_batches(answers: Answers) -> Callable[..., None]:
    """``answers`` gets the loaded model, whole batches of chats and the settings."""

    def answer(loaded: Any, take: Any, done: Any, settings: GenerationSettings) -> None:
        while prompts := take(settings.batch_size):
            chats = [prompt.key.messages for prompt in prompts]
            for prompt, found in zip(prompts, answers(loaded, chats, settings), strict=True):
                done(prompt, found)

    return answer
