"""What the approximations of one model share: sites, calibration, a recording, judges of its answers, its speed.

Covered: made once, before anything is on the model. Not covered: measuring an approximation with it (``sweep.py``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from trimtab.models import LoadedModel

if TYPE_CHECKING:
    from trimtab.approximation.calibration import Calibration
    from trimtab.vetting.fluency import Fluency
    from trimtab.vetting.own_words import OwnWords
    from trimtab.vetting.relevance import Relevance
    from trimtab.vetting.site_errors import Recording

SPEED_CHATS, SPEED_TOKENS = 8, 16
ERROR_ROWS, ERROR_TOKENS = 12, 48


class Speed(NamedTuple):
    """CPU or wall seconds for the same answers: exact and approximated, measured one after the other."""

    exact_seconds: float
    seconds: float
    exact_tokens: int
    tokens: int

    @property
    def exact_rate(self) -> float:
        """Tokens read and written per second by the exact model."""
        return self.exact_tokens / self.exact_seconds

    @property
    def rate(self) -> float:
        """The same under the approximation."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """Time per token, approximated over exact."""
        return self.exact_rate / self.rate


class Bench:
    """The loaded model with what its approximations share: sites, calibration, a recording, the exact speed."""

    def __init__(self, loaded: LoadedModel) -> None:
        from trimtab.approximation.sites import base_of, find_sites

        self.loaded = loaded
        self.base = base_of(loaded.model)
        self.layers = find_sites(self.base)
        self._calibration: Calibration | None = None
        self._recording: Recording | None = None
        self._own: OwnWords | None = None
        self._fluency: Fluency | None = None
        self._relevance: Relevance | None = None

    @property
    def calibration(self) -> Calibration:
        if self._calibration is None:
            from trimtab.approximation.calibration import collect, default_rows

            self._calibration = collect(self.base, self.layers, default_rows(self.loaded.tokenizer))
        return self._calibration

    @property
    def recording(self) -> Recording:
        """Bundled calibration chats, cut to one length, read by the exact model; call before approximating."""
        if self._recording is None:
            import torch

            from trimtab.approximation.calibration import default_rows
            from trimtab.vetting.site_errors import record

            rows = sorted(default_rows(self.loaded.tokenizer), key=len, reverse=True)[:ERROR_ROWS]
            width = min(ERROR_TOKENS, len(rows[-1]))
            ids = torch.tensor([row[-width:] for row in rows], device=self.base.device)
            self._recording = record(self.base, self.layers, ids)
        return self._recording

    def fluency(self, tokens: int) -> Fluency:
        """The exact model as a judge of language; call before approximating."""
        if self._fluency is None:
            from trimtab.vetting.fluency import Fluency

            self._fluency = Fluency(self.loaded, tokens, self._own_words(tokens))
        return self._fluency

    def relevance(self, tokens: int) -> Relevance:
        """The exact model as a judge of what an answer is about; call before approximating."""
        if self._relevance is None:
            from trimtab.vetting.relevance import Relevance

            self._relevance = Relevance(self.loaded, tokens, self._own_words(tokens))
        return self._relevance

    def _own_words(self, tokens: int) -> OwnWords:
        if self._own is None:
            from trimtab.vetting.own_words import own_words

            self._own = own_words(self.loaded, tokens)
        return self._own


def needs_calibration(name: str) -> bool:
    """Whether a name calibrates on the exact model's activations."""
    return any(part.partition(":")[0] in ("teal", "cats", "smoothquant", "omniquant") for part in name.split("+"))


def timed(loaded: LoadedModel) -> tuple[float, int]:
    """Seconds to answer a few bundled instructions, and the tokens read and written.

    On a CPU the process's own CPU time, so that other work on the machine does not count; else wall time.
    """
    from trimtab import data
    from trimtab.generation import GenerationSettings, generate

    chats = [[{"role": "user", "content": text}] for text in data.instructions("eval")[:SPEED_CHATS]]
    settings = GenerationSettings(max_new_tokens=SPEED_TOKENS, batch_size=SPEED_CHATS)
    on_cpu = loaded.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    started = clock()
    answers = generate(loaded, chats, settings)
    return clock() - started, sum(answer.tokens + answer.prompt_tokens for answer in answers)
