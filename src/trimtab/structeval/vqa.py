"""Questions about the picture, put to a vision model with the official prompt.

Covered: any model that inspect reaches (OpenAI, a server that speaks its protocol, vLLM), or one in this process
(``local_judge.py``); one call for each picture with all its questions; answers cached by the picture's hash; a failed,
unparsable or incomplete reply is unscored, never wrong.
Not covered: training a judge, pictures (``render``), the check without a model (``offline.py``).

Source of the prompt: the paper's Figure 5.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.structeval import generations
from trimtab.structeval.tasks import Question

PROMPT = (
    "You are given an image and a list of question-answer pairs. For each pair, verify if the image content supports "
    "the expected answer based on the corresponding question. Base your judgment solely on the visual content of the "
    "provided image, and the question. Do not use any external information or common-sense reasoning beyond what "
    "is visible. Respond with a JSON object mapping each question number to true or false "
    '(e.g., {"1": true, "2": false}). If '
    "the image is unclear or does not contain enough information to answer, use null for that question. Here are "
    "the question-answer pairs:"
)
MAX_TOKENS = 1024
_OBJECT = re.compile(r"\{[^{}]*\}", re.DOTALL)
_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$", re.IGNORECASE)

Ask = Callable[[bytes, str], Awaitable[str]]  # picture (PNG), prompt -> reply


class Verdict(NamedTuple):
    """``answers``: true, false or null (None) for each question; None as a whole: the judge failed, see ``error``."""

    answers: tuple[bool | None, ...] | None
    error: str | None = None

    @property
    def score(self) -> float | None:
        """Share of the questions answered true (null counts as not shown); None where the judge failed."""
        return None if not self.answers else sum(answer is True for answer in self.answers) / len(self.answers)

    @property
    def official(self) -> float:
        """The reference's number: a failure of the judge is 0."""
        return self.score or 0.0


class Asked(NamedTuple):
    """One picture and its questions."""

    png: bytes
    questions: tuple[Question, ...]


def prompt_for(questions: Sequence[Question]) -> str:
    """The official prompt with its numbered pairs."""
    pairs = [
        f"{number}. Question: {pair.question} Expected Answer: {pair.answer}"
        for number, pair in enumerate(questions, 1)
    ]
    return "\n".join([PROMPT, *pairs])


def read_reply(reply: str, count: int) -> Verdict:
    """The judge's JSON object, alone or as the first one in its reply; every question must be in it."""
    text = _FENCE.sub("", reply.strip())
    for candidate in (text, *(found.group() for found in _OBJECT.finditer(text))):
        try:
            document = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            return _verdict(document, count)
    return Verdict(None, f"no JSON object in the judge's reply: {reply.strip()[:80]!r}")


def _verdict(document: dict[str, Any], count: int) -> Verdict:
    answers: list[bool | None] = []
    for number in range(1, count + 1):
        if str(number) not in document:
            return Verdict(None, f"the judge left out question {number}")
        answer = document[str(number)]
        if answer is not None and not isinstance(answer, bool):
            return Verdict(None, f"the judge answered question {number} with {str(answer)[:40]!r}")
        answers.append(answer)
    return Verdict(tuple(answers))


class Judge:
    """A vision model with a cache.

    Args:
        name: of the model; part of the cache's key and of every report.
        ask: sends a picture and a prompt, returns the reply; may raise.
        cache: JSON Lines file; failures are not kept, so that the next run asks again.
        connections: calls at once.
    """

    def __init__(self, name: str, ask: Ask, cache: Path | None = None, connections: int = 8) -> None:
        self.name, self._ask, self._cache, self._connections = name, ask, cache, connections
        rows = generations.read_lines(cache) if cache else []
        self._known = {row["key"]: tuple(row["answers"]) for row in rows}

    def verdicts(self, asked: Sequence[Asked]) -> list[Verdict]:
        """A verdict for each picture, in order; equal pictures with equal questions are asked once."""
        return asyncio.run(self.ask_for(asked))

    async def ask_for(self, asked: Sequence[Asked]) -> list[Verdict]:
        """The same inside a loop that runs already (a client of a server belongs to one loop)."""
        waiting = {self.key(one): one for one in asked if one.questions and self.key(one) not in self._known}
        failed = await self._ask_all(waiting) if waiting else {}
        return [self._found(one, failed) for one in asked]

    def key(self, asked: Asked) -> str:
        """Hash of judge, prompt and picture."""
        digest = hashlib.sha256(asked.png)
        digest.update(f"\0{self.name}\0{prompt_for(asked.questions)}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _found(self, one: Asked, failed: dict[str, Verdict]) -> Verdict:
        if not one.questions:
            return Verdict(None, "the task has no questions")
        key = self.key(one)
        return Verdict(self._known[key]) if key in self._known else failed[key]

    async def _ask_all(self, waiting: dict[str, Asked]) -> dict[str, Verdict]:
        gate = asyncio.Semaphore(self._connections)

        async def one(key: str, asked: Asked) -> tuple[str, Verdict]:
            async with gate:
                try:
                    reply = await self._ask(asked.png, prompt_for(asked.questions))
                except Exception as error:  # noqa: BLE001 - a server fails in many ways; each leaves this item unscored
                    return key, Verdict(None, f"the judge failed: {type(error).__name__}: {str(error)[:200]}")
            verdict = read_reply(reply, len(asked.questions))
            self._keep(key, verdict)
            return key, verdict

        found = await asyncio.gather(*(one(key, asked) for key, asked in waiting.items()))
        return {key: verdict for key, verdict in found if verdict.answers is None}

    def _keep(self, key: str, verdict: Verdict) -> None:
        if verdict.answers is None:
            return
        self._known[key] = verdict.answers
        if self._cache is not None:
            with generations.append(self._cache) as stream:
                generations.write_line(stream, {"key": key, "judge": self.name, "answers": list(verdict.answers)})


def judge_named(name: str, *, base_url: str | None = None, cache: Path | None = None) -> Judge:
    """``local/NAME``: a vision model in this process; anything else: through inspect.

    Raises:
        ModelError: when a local model cannot be used. What inspect raises for an unknown provider or a missing key.
    """
    from trimtab.structeval import local_judge

    if name.startswith(local_judge.PREFIX) and not base_url:
        return local_judge.local_judge(name, cache=cache)
    return inspect_judge(name, base_url=base_url, cache=cache)


def inspect_judge(name: str, *, base_url: str | None = None, cache: Path | None = None, connections: int = 8) -> Judge:
    """A judge through inspect: ``openai/gpt-4.1-mini``, or any model name with the address of its server.

    Raises:
        What inspect raises for an unknown provider or a missing key.
    """
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig, get_model

    served = name if "/" in name and not base_url else f"openai/{name.removeprefix('openai/')}"
    config = GenerateConfig(temperature=0.0, max_tokens=MAX_TOKENS, max_connections=connections)
    model = get_model(served, base_url=base_url, config=config)

    async def ask(png: bytes, prompt: str) -> str:
        image = ContentImage(image="data:image/png;base64," + base64.b64encode(png).decode())
        output = await model.generate([ChatMessageUser(content=[ContentText(text=prompt), image])])
        return str(output.completion)

    return Judge(served if not base_url else f"{served}@{base_url}", ask, cache, connections)
