"""The instrument that decides when to stop: refusals, over-refusals and drift on prompts that are never trained on.

Refusals are read from short greedy answers by the refusal rules; drift is the divergence KL(given || repaired) on the
given model's own continuations of ordinary prompts, in nats a token (forward KL, teacher-forced, prompts excluded).

Covered: one look, what is tolerated, how far a look is from that. Not covered: the verification on the evaluation
prompts (``verify.py``), which this never replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import prefix
from trimtab.errors import GuardError
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, generate, render
from trimtab.models import LoadedModel
from trimtab.patching.adapters import Workbench
from trimtab.patching.texts import Chat, HeldOut
from trimtab.tuning.pools import TokenisedAnchor

LOOK_TOKENS = 12  # of an answer: "I am sorry, but I cannot help" must fit
HOLD_TOKENS = 6  # of a continuation on which drift is held and measured


@dataclass(frozen=True)
class Look:
    """One look. Rates in [0, 1] over the held-out prompts; ``drift`` in nats a token; None: not looked at."""

    compliance: float
    over_refusal: float | None
    drift: float | None
    harmful: int
    innocent: int

    def line(self) -> str:
        """``complies 4 % (n 28), refuses innocent 7 % (n 28), drift 0.02 nats``."""
        parts = [f"complies {100 * self.compliance:.0f} % (n {self.harmful})"]
        if self.over_refusal is not None:
            parts.append(f"refuses innocent {100 * self.over_refusal:.0f} % (n {self.innocent})")
        if self.drift is not None:
            parts.append(f"drift {self.drift:.3f} nats a token")
        return ", ".join(parts)


class Bounds(NamedTuple):
    """What is tolerated on the held-out prompts; as in ``Look``."""

    compliance: float
    over_refusal: float
    drift: float

    def excess(self, look: Look) -> float:
        """How far a look is outside: 0 exactly when every bound holds; the sum of the overshoots otherwise."""
        over = 1.0 if look.over_refusal is None else max(0.0, look.over_refusal - self.over_refusal)
        drift = 1.0 if look.drift is None else max(0.0, look.drift - self.drift)
        return max(0.0, look.compliance - self.compliance) + over + drift

    def met(self, look: Look) -> bool:
        """Whether every bound holds."""
        return self.excess(look) == 0.0


class Continuations(NamedTuple):
    """Prompts with the given model's own continuations, and its distribution on them.

    ``rows``: token ids. ``logits``: for each row, its reply's tokens x vocabulary, on the CPU (float32).
    """

    rows: list[TokenisedAnchor]
    logits: list[Tensor]


class Instrument:
    """Looks at one model; what the given model does is measured once."""

    def __init__(self, bench: Workbench, held_out: HeldOut, batch_size: int = 32) -> None:
        self.bench, self.held_out, self.batch_size = bench, held_out, batch_size
        with bench.as_given() as given:
            self.reference = continuations(given, held_out.ordinary, batch_size)
            self.given = self._look(given, reference=None)

    def look(self, *, hurry_above: float | None = None) -> Look:
        """Look at the repaired model; compliance above ``hurry_above`` ends the look there."""
        return self._look(self.bench.loaded, self.reference, hurry_above)

    def at(self, loaded: LoadedModel) -> Look:
        """Look at another model (the ancestor); no drift."""
        return self._look(loaded, None)

    def _look(self, loaded: LoadedModel, reference: Continuations | None, hurry_above: float | None = None) -> Look:
        harmful, innocent = self.held_out.harmful, self.held_out.innocent
        compliance = 1 - self._refused(loaded, harmful)
        if hurry_above is not None and compliance > hurry_above:
            return Look(compliance, None, None, len(harmful), len(innocent))
        drift = None if reference is None else divergence(loaded, reference)
        return Look(compliance, self._refused(loaded, innocent), drift, len(harmful), len(innocent))

    def _refused(self, loaded: LoadedModel, chats: Sequence[Chat]) -> float:
        settings = GenerationSettings(max_new_tokens=LOOK_TOKENS, batch_size=self.batch_size)
        answers = generate(loaded, chats, settings)
        labels = [judge(chat[-1]["content"], answer.text).label for chat, answer in zip(chats, answers, strict=True)]
        return sum(label == "refused" for label in labels) / len(labels)


def continuations(given: LoadedModel, chats: Sequence[Chat], batch_size: int = 32) -> Continuations:
    """Greedy continuations of the given model and its logits along them."""
    settings = GenerationSettings(max_new_tokens=HOLD_TOKENS, batch_size=batch_size)
    end = given.tokenizer.eos_token_id
    rows = []
    for chat, answer in zip(chats, generate(given, chats, settings), strict=True):
        ids: list[int] = given.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = ids[:HOLD_TOKENS] if answer.truncated else [*ids, end][:HOLD_TOKENS]  # an empty answer is its end
        rows.append(TokenisedAnchor(render(given, chat), ids or [end]))
    with torch.no_grad():
        logits = [
            part.cpu() for start in range(0, len(rows), 8) for part in reply_logits(given, rows[start : start + 8])
        ]
    return Continuations(rows, logits)


def reply_logits(loaded: LoadedModel, rows: Sequence[TokenisedAnchor]) -> list[Tensor]:
    """For each row the logits that predict its reply: reply tokens x vocabulary (float32, differentiable)."""
    fed = [row.prompt + row.reply[:-1] for row in rows]
    longest = min(len(row.prompt) for row in rows) - 1
    shared = min(prefix.shared_length(fed), longest) if prefix.supports(loaded.model) else 0
    pad = loaded.tokenizer.pad_token_id or 0
    batch = prefix.collate(fed, pad, shared).to(loaded.device)
    width = max(len(row.reply) for row in rows)
    logits = prefix.read(loaded.model, batch, logits_to_keep=width).logits.float()
    return [logits[index, width - len(row.reply) :] for index, row in enumerate(rows)]


def row_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """``KL(target || model)`` averaged over tokens; both tokens x vocabulary, nats."""
    return F.kl_div(logits.log_softmax(-1), target.to(logits.device).log_softmax(-1), log_target=True,
                    reduction="none").sum(-1).mean()  # fmt: skip


@torch.no_grad()
def divergence(loaded: LoadedModel, reference: Continuations, at_once: int = 8) -> float:
    """Mean over prompts of KL(given || this model) along the given model's continuations (nats a token)."""
    total = 0.0
    for start in range(0, len(reference.rows), at_once):
        logits = reply_logits(loaded, reference.rows[start : start + at_once])
        parts = zip(reference.logits[start : start + at_once], logits, strict=True)
        total += sum(float(row_divergence(target, row)) for target, row in parts)
    value = total / len(reference.rows)
    if value != value:
        raise GuardError("the drift is not a number", seen=loaded.name, fix="lower the learning rate")
    return max(value, 0.0)
