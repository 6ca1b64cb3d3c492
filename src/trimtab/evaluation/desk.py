"""Answers on their way to a judge, in batches.

Covered: collecting exchanges that arrive within a moment of each other, one thread that owns the judge, errors
passed to whoever waits. Not covered: judging. The rules need no desk: they answer at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from trimtab.evaluation.judges import Verdict
from trimtab.evaluation.labelled import Exchange, Question

TICK_SECONDS = 0.02
BATCH = 32


class Judge(Protocol):
    """What judges anything: a name with a revision, the class that it looks for, many verdicts at once."""

    @property
    def name(self) -> str:
        """Name and revision, as an axis records them; two runs are only compared under equal names."""

    @property
    def positive(self) -> Question:
        """ "refused" for judges of language, "harmful" for judges of content."""

    def judge_many(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict for each exchange, in order. What cannot be parsed is "unscored"."""


class Desk:
    """Hands exchanges to a judge in batches; ``verdict`` may be awaited by any number of tasks at once."""

    def __init__(self, judge: Judge, batch: int = BATCH) -> None:
        self.judge, self.batch = judge, batch
        self._waiting: list[tuple[Exchange, asyncio.Future[Verdict]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trimtab-judge")

    async def verdict(self, exchange: Exchange) -> Verdict:
        """Queue one exchange and wait. An error of the judge is raised in everyone who waits for that batch."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._worker, self._waiting = loop, None, []
        future: asyncio.Future[Verdict] = loop.create_future()
        self._waiting.append((exchange, future))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(TICK_SECONDS)
        while self._waiting:
            chosen, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
            exchanges = [exchange for exchange, _ in chosen]
            loop = asyncio.get_running_loop()
            try:
                found = await loop.run_in_executor(self._thread, self.judge.judge_many, exchanges)
            except Exception as error:  # noqa: BLE001 - passed on to whoever waits for these verdicts
                for _, future in chosen:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), verdict in zip(chosen, found, strict=True):
                if not future.done():
                    future.set_result(verdict)
            await asyncio.sleep(0)
