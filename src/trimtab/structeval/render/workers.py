"""Warm sandboxed programs that answer one request at a time, and a pool of them.

A worker that hangs, dies, answers too much or takes too much memory is killed with all it started; the next request
gets a new one. Nothing of one request is kept for the next, apart from what the worker itself keeps.
"""

from __future__ import annotations

import json
import os
import queue
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.structeval import sandbox
from trimtab.structeval.processes import Usage, usage

MAX_ANSWER = 64 * 2**20
MAX_RESIDENT = 3 * 2**30
MAX_PROCESSES = 128  # of one worker; the resource limits of a script are lower where they work
START_SECONDS = 180.0


class RenderError(TrimtabError):
    """A renderer cannot be started or used; says nothing about the text that was to be rendered."""


class WorkerFailed(Exception):  # noqa: N818 - it is about the text, not a fault of the program
    """The text made the worker hang, die, or exceed a limit."""


class Worker:
    """One warm program. ``start`` gives a new sandboxed process that says it is ready with one message."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start = name, start
        self._process: Any = None

    def call(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send and wait. Raises WorkerFailed, after which the process is gone, or RenderError if none starts."""
        if self._process is None:
            self._launch()
        try:
            body = json.dumps(request).encode()
            self._process.stdin.write(struct.pack(">I", len(body)) + body)
            self._process.stdin.flush()
            seconds *= sandbox.patience()
            return self._read(time.monotonic() + seconds, f"stopped after {seconds:.0f} s")
        except (WorkerFailed, OSError) as error:
            self.close()
            raise error if isinstance(error, WorkerFailed) else WorkerFailed("it crashed") from error

    def _launch(self) -> None:
        try:
            self._process = self._start()
            self._read(time.monotonic() + START_SECONDS, f"silent for {START_SECONDS:g} s")
        except (WorkerFailed, OSError) as error:
            self.close()
            raise RenderError(
                f"the {self.name} renderer does not start",
                seen=error,
                fix="run `trimtab doctor` and install what it names",
            ) from error

    def _read(self, end: float, late: str) -> dict[str, Any]:
        (size,) = struct.unpack(">I", self._take(4, end, late))
        if size > MAX_ANSWER:
            raise WorkerFailed(f"an answer of {size / 2**20:.0f} MiB")
        answer = json.loads(self._take(size, end, late))
        if not isinstance(answer, dict):
            raise WorkerFailed("an answer that makes no sense")
        return answer

    def _take(self, count: int, end: float, late: str) -> bytes:
        number = self._process.stdout.fileno()
        parts: list[bytes] = []
        while count:
            ready, _, _ = select.select([number], [], [], min(0.2, max(end - time.monotonic(), 0)))
            if ready:
                part = os.read(number, min(count, 1 << 20))
                if not part:
                    raise WorkerFailed("it crashed or was killed by a limit")
                parts.append(part)
                count -= len(part)
            elif time.monotonic() >= end:
                raise WorkerFailed(late)
            else:
                _check(usage(self._process.pid))
        return b"".join(parts)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            sandbox.kill(self._process)
            self._process = None


def _check(used: Usage) -> None:
    if used.resident > MAX_RESIDENT:
        raise WorkerFailed(f"more than {MAX_RESIDENT / 2**30:.0f} GiB of memory")
    if used.processes > MAX_PROCESSES:
        raise WorkerFailed(f"{used.processes} processes, at most {MAX_PROCESSES} are allowed")


class Pool:
    """At most ``size`` workers of one kind, started when first needed."""

    def __init__(self, name: str, start: Callable[[], Any], size: int) -> None:
        self._all = [Worker(name, start) for _ in range(size)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Borrow one, waiting until one is idle."""
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def call(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Borrow one for one request."""
        with self.worker() as worker:
            return worker.call(request, seconds)

    def close(self) -> None:
        """End all of them."""
        for worker in self._all:
            worker.close()
