"""Concurrent requests to a model in memory, answered in batches.

Covered: collecting requests for a moment, sorting by length, one worker thread that owns the model, requests whose
settings differ, several event loops one after the other.
Not covered: rendering and decoding (``generation.py``), the inspect side (``provider.py``).

The thread keeps the event loop free while the model computes, so requests that arrive meanwhile fill the next batch.
Results depend on the company in a batch only through floating-point padding effects; under sampling the seed is fixed
for each batch, so a run repeats its texts only with the same prompts and the same batch size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from trimtab.generation import Generation, GenerationSettings, Message, generate
from trimtab.models import LoadedModel

Result = TypeVar("Result")

TICK_SECONDS = 0.005  # requests that arrive within such a moment of each other share a batch
MAX_TICKS = 400  # but nobody waits longer than this many


@dataclass
class Request:
    """One chat with its length in tokens, and the future that its answer goes to."""

    messages: Sequence[Message]
    tokens: int
    settings: GenerationSettings
    answer: asyncio.Future[Generation] = field(repr=False)


class Batcher:
    """Answers chats on one model; ``answer`` may be awaited by any number of tasks at once.

    Args:
        loaded: the model; only this object's thread may run it meanwhile.
        batch_size: most chats in one forward pass.
        on_answers: called with the number of chats answered, after every batch (for a progress bar).
        expected: how many chats will come, where that is known: the first batch then waits for them (2 s at most), so
            that tasks which start one after the other share batches.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int,
        on_answers: Callable[[int], object] | None = None,
        expected: int = 0,
    ) -> None:
        self.loaded, self.batch_size, self.on_answers, self.expected = loaded, batch_size, on_answers, expected
        self._waiting: list[Request] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trimtab-model")

    async def answer(self, messages: Sequence[Message], tokens: int, settings: GenerationSettings) -> Generation:
        """Queue one chat and wait for its answer. Errors of the model are raised in every chat of the batch."""
        loop = asyncio.get_running_loop()
        if (
            loop is not self._loop
        ):  # another ``inspect_ai.eval`` in this process: what the old loop left is gone with it
            self._loop, self._worker, self._waiting = loop, None, []
        request = Request(messages, tokens, settings, loop.create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await request.answer

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run something else on the model's thread, so that nothing runs on the model twice at once."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Let the thread end once it is idle."""
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        await self._gather()
        while batch := self._next_batch():
            try:
                answers = await self.in_thread(lambda chosen=batch: self._run(chosen))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - passed on to whoever waits for these answers
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            for request, generation in zip(batch, answers, strict=True):
                if not request.answer.done():  # cancelled meanwhile
                    request.answer.set_result(generation)
            if self.on_answers is not None:
                self.on_answers(len(batch))
            await asyncio.sleep(0)

    async def _gather(self) -> None:
        """Wait until no request came for a moment, so that the first batch is full and sorted too."""
        for _ in range(MAX_TICKS):
            before = len(self._waiting)
            await asyncio.sleep(TICK_SECONDS)
            if len(self._waiting) == before and before >= self.expected:
                break
        self.expected = 0  # what comes later joins the batches as they are made

    def _next_batch(self) -> list[Request]:
        """The shortest waiting chats that share the settings of the first; requests cancelled meanwhile are dropped."""
        self._waiting = [request for request in self._waiting if not request.answer.done()]
        if not self._waiting:
            return []
        settings = self._waiting[0].settings
        alike = sorted((r for r in self._waiting if r.settings == settings), key=lambda request: request.tokens)
        batch = alike[: self.batch_size]
        chosen = set(map(id, batch))
        self._waiting = [request for request in self._waiting if id(request) not in chosen]
        return batch

    def _run(self, batch: Sequence[Request]) -> list[Generation]:
        return generate(self.loaded, [request.messages for request in batch], batch[0].settings)
