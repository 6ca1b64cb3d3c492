"""Concurrent requests to a model in memory, answered together.

Covered: collecting requests for a moment, sorting by length, one worker thread that owns the model, requests that join
while others are answered, requests whose settings differ, several event loops one after the other.
Not covered: rendering and decoding (``generation.py``, ``decoding.py``), the inspect side (``provider.py``).

The thread keeps the event loop free while the model computes, and takes what has arrived meanwhile whenever rows are
free. Answers depend on their company only through floating-point effects of padding.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from trimtab.generation import Generation, GenerationSettings, Message, Prompt, answer
from trimtab.models import LoadedModel

Result = TypeVar("Result")

TICK_SECONDS = 0.005  # requests that arrive within such a moment of each other share a batch
MAX_TICKS = 400  # but nobody waits longer than this many


@dataclass
class Request:
    """One chat, its token ids, and the future that its answer goes to."""

    messages: Sequence[Message]
    ids: list[int]
    settings: GenerationSettings
    answer: asyncio.Future[Generation] = field(repr=False)


class Batcher:
    """Answers chats on one model; ``answer`` may be awaited by any number of tasks at once.

    Args:
        loaded: the model; only this object's thread may run it meanwhile.
        batch_size: most chats in one forward pass.
        on_answers: called with the number of chats answered, as they are (for a progress bar).
        expected: how many chats will come, where that is known: the first pass then waits for them (2 s at most), so
            that tasks which start one after the other share passes.
        keep: called on the model's thread with each answer before anything else happens, so that a killed run has it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int,
        on_answers: Callable[[int], object] | None = None,
        expected: int = 0,
        keep: Callable[[Request, Generation], object] | None = None,
    ) -> None:
        self.loaded, self.batch_size, self.on_answers, self.expected = loaded, batch_size, on_answers, expected
        self.keep = keep
        self._waiting: list[Request] = []
        self._lock = threading.Lock()  # ``_waiting`` is filled by the event loop and emptied by the model's thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trimtab-model")

    async def answer(self, messages: Sequence[Message], ids: list[int], settings: GenerationSettings) -> Generation:
        """Queue one chat and wait for its answer; an error of the model is raised in all chats in flight."""
        loop = asyncio.get_running_loop()
        request = Request(messages, ids, settings, loop.create_future())
        with self._lock:
            if loop is not self._loop:  # another ``inspect_ai.eval`` in this process: what the old loop left is gone
                self._loop, self._worker, self._waiting = loop, None, []
            self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work(loop))
        return await request.answer

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run something else on the model's thread, so that nothing runs on the model twice at once."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Let the thread end once it is idle."""
        self._thread.shutdown(wait=False)

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        await self._gather()
        while (settings := self._next_settings()) is not None:
            flight: list[Request] = []

            def take(count: int, taken: list[Request] = flight, alike: GenerationSettings = settings) -> list[Prompt]:
                found = self._take(count, alike, loop)
                taken.extend(found)
                return [Prompt(request, request.ids) for request in found]

            def done(prompt: Prompt, found: Generation) -> None:
                if self.keep is not None:
                    self.keep(prompt.key, found)
                # Raises where that loop is over, which stops work that nobody waits for.
                loop.call_soon_threadsafe(self._deliver, prompt.key, found)

            try:
                await self.in_thread(lambda: answer(self.loaded, take, done, settings))
            except Exception as error:  # noqa: BLE001 - passed on to whoever waits for these answers
                for request in flight or self._take(len(self._waiting), settings, loop):
                    if not request.answer.done():
                        request.answer.set_exception(error)
            await asyncio.sleep(0)

    def _deliver(self, request: Request, found: Generation) -> None:
        if not request.answer.done():  # cancelled meanwhile
            request.answer.set_result(found)
        if self.on_answers is not None:
            self.on_answers(1)

    async def _gather(self) -> None:
        """Wait until no request came for a moment, so that the first batch is full and sorted too."""
        for _ in range(MAX_TICKS):
            before = len(self._waiting)
            await asyncio.sleep(TICK_SECONDS)
            if len(self._waiting) == before and before >= self.expected:
                break
        self.expected = 0  # what comes later joins the batches as they are made

    def _next_settings(self) -> GenerationSettings | None:
        """Settings of the first chat that waits; chats cancelled meanwhile are dropped."""
        with self._lock:
            self._waiting = [request for request in self._waiting if not request.answer.done()]
            return self._waiting[0].settings if self._waiting else None

    def _take(self, count: int, settings: GenerationSettings, loop: asyncio.AbstractEventLoop) -> list[Request]:
        """The shortest waiting chats with these settings, so many at most.

        None where another event loop has begun since: the thread may still be busy for the last one, and what it took
        now would be answered to nobody.
        """
        with self._lock:
            if self._loop is not loop:
                return []
            alike = [request for request in self._waiting if request.settings == settings and not request.answer.done()]
            chosen = sorted(alike, key=lambda request: len(request.ids))[:count]
            taken = set(map(id, chosen))
            self._waiting = [request for request in self._waiting if id(request) not in taken]
        return chosen
