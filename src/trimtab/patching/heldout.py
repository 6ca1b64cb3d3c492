"""The instrument that decides when to stop: refusals, over-refusals and drift on prompts that are never trained on.

Refusals are read from short greedy answers by the refusal rules. Drift is a divergence in nats a token (forward KL
along the left-hand model's own greedy continuation, prompts excluded): on the user's prompts from the given model; on
ordinary ones from the given model or the ancestor, whichever is nearer, for there the repaired model may be either. The
larger of the two means counts.

Covered: one look, what is tolerated, how far a look is from that. Not covered: the verification on the evaluation
prompts (``verify.py``), which this never replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import prefix
from trimtab.errors import GuardError
from trimtab.evaluation.judges import FINISHED_TOKENS, judge, undecided
from trimtab.generation import GenerationSettings, generate, render
from trimtab.models import LoadedModel
from trimtab.patching.adapters import Workbench
from trimtab.patching.texts import Chat, HeldOut
from trimtab.precision import training_scope
from trimtab.tuning.pools import TokenisedAnchor, turn_end

LOOK_TOKENS = 12  # of an answer, enough for most refusals; what is cut off in an apology is finished
HOLD_TOKENS = 6  # of a continuation on which drift is held and measured
SCOUTS, SCOUT_MARGIN = 4, 0.15  # a quarter of the harmful prompts first: most looks on the way are far outside


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

    def __init__(self, bench: Workbench, held_out: HeldOut, batch_size: int = 64, bf16: bool | None = False) -> None:
        """``bf16``: of the divergences, as in ``training_scope``; answers are always written as the model is."""
        self.bench, self.held_out, self.batch_size, self.bf16 = bench, held_out, batch_size, bf16
        self.ancestor: Continuations | None = None
        with bench.as_given() as given:
            self.ordinary = continuations(given, held_out.ordinary, batch_size, bf16)
            self.kept = continuations(given, held_out.kept, batch_size, bf16) if held_out.kept else None
            self.given = self._look(given, drift=False)

    def look(self, hurry: Bounds | None = None) -> Look:
        """Look at the repaired model; with bounds to hurry by, the look ends where one is clearly missed."""
        return self._look(self.bench.loaded, drift=True, hurry=hurry)

    def at_ancestor(self, ancestor: LoadedModel) -> Look:
        """Look at the ancestor (no drift), and allow the repaired model to be like it on ordinary prompts."""
        if same_vocabulary(self.bench.loaded, ancestor):
            self.ancestor = continuations(ancestor, self.held_out.ordinary, self.batch_size, self.bf16)
        return self._look(ancestor, drift=False)

    def drift(self, loaded: LoadedModel) -> float:
        """See the module's docstring (nats a token)."""
        ordinary = divergences(loaded, self.ordinary, self.bf16)
        if self.ancestor is not None:
            other = divergences(loaded, self.ancestor, self.bf16)
            ordinary = [min(pair) for pair in zip(ordinary, other, strict=True)]
        parts = [ordinary] if self.kept is None else [ordinary, divergences(loaded, self.kept, self.bf16)]
        return max(sum(part) / len(part) for part in parts)

    def _look(self, loaded: LoadedModel, *, drift: bool, hurry: Bounds | None = None) -> Look:
        harmful, innocent = self.held_out.harmful, self.held_out.innocent
        if hurry is not None:
            scouts = harmful[: max(1, len(harmful) // SCOUTS)]
            early = 1 - self._refused(loaded, scouts)
            if early > hurry.compliance + SCOUT_MARGIN:
                return Look(early, None, None, len(scouts), len(innocent))
        compliance = 1 - self._refused(loaded, harmful)
        if hurry is not None and compliance > hurry.compliance:
            return Look(compliance, None, None, len(harmful), len(innocent))
        refused = self._refused(loaded, innocent)
        far = hurry is not None and refused > hurry.over_refusal + SCOUT_MARGIN
        moved = self.drift(loaded) if drift and not far else None
        return Look(compliance, refused, moved, len(harmful), len(innocent))

    def _refused(self, loaded: LoadedModel, chats: Sequence[Chat]) -> float:
        return refused(loaded, chats, self.batch_size)


def refused(loaded: LoadedModel, chats: Sequence[Chat], batch_size: int = 64) -> float:
    """The share of these prompts that the model refuses."""
    answers = decided_answers(loaded, chats, GenerationSettings(LOOK_TOKENS, batch_size=batch_size))
    labels = [judge(chat[-1]["content"], answer).label for chat, answer in zip(chats, answers, strict=True)]
    return sum(label == "refused" for label in labels) / len(labels)


def decided_answers(loaded: LoadedModel, chats: Sequence[Chat], settings: GenerationSettings) -> list[str]:
    """Greedy answers; one that is cut off after an apology that refuses nothing yet is written again, longer."""
    answers = generate(loaded, chats, settings)
    texts = [answer.text for answer in answers]
    cut = [
        place
        for place, (chat, answer) in enumerate(zip(chats, answers, strict=True))
        if undecided(chat[-1]["content"], answer.text, answer.truncated)
    ]
    if cut and settings.max_new_tokens < FINISHED_TOKENS:
        longer = replace(settings, max_new_tokens=FINISHED_TOKENS)
        for place, answer in zip(cut, generate(loaded, [chats[place] for place in cut], longer), strict=True):
            texts[place] = answer.text
    return texts


def same_vocabulary(one: LoadedModel, other: LoadedModel) -> bool:
    """Whether both models' distributions are over the same tokens."""
    if one.model is other.model:
        return True
    models: list[Any] = [one.model, other.model]
    first, second = (model.get_input_embeddings().weight.shape[0] for model in models)
    return first == second and bool(one.tokenizer.get_vocab() == other.tokenizer.get_vocab())


def continuations(
    given: LoadedModel, chats: Sequence[Chat], batch_size: int = 64, bf16: bool | None = False
) -> Continuations:
    """Greedy continuations of the given model and its logits along them."""
    settings = GenerationSettings(max_new_tokens=HOLD_TOKENS, batch_size=batch_size)
    end = turn_end(given)
    rows = []
    for chat, answer in zip(chats, generate(given, chats, settings), strict=True):
        ids: list[int] = given.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = ids[:HOLD_TOKENS] if answer.truncated else [*ids, end][:HOLD_TOKENS]  # an empty answer is its end
        rows.append(TokenisedAnchor(render(given, chat), ids or [end]))
    return Continuations(rows, measured_logits(given, rows, bf16))


@torch.no_grad()
def measured_logits(
    loaded: LoadedModel, rows: Sequence[TokenisedAnchor], bf16: bool | None = False, at_once: int = 8
) -> list[Tensor]:
    """As ``reply_logits``, a few rows at a time, without gradient, on the CPU; ``bf16``: see ``training_scope``."""
    found: list[Tensor] = []
    for start in range(0, len(rows), at_once):
        with training_scope(loaded.device, bf16):
            part = reply_logits(loaded, rows[start : start + at_once])
        found += [row.cpu().clone() for row in part]
    return found


def reply_logits(loaded: LoadedModel, rows: Sequence[TokenisedAnchor]) -> list[Tensor]:
    """For each row the logits that predict its reply: reply tokens x vocabulary (float32, differentiable)."""
    return prefix.reply_logits(
        loaded.model, [(row.prompt, row.reply) for row in rows], loaded.tokenizer.pad_token_id or 0
    )


def row_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """``KL(target || model)`` averaged over tokens; both tokens x vocabulary, nats."""
    return F.kl_div(logits.log_softmax(-1), target.to(logits.device).log_softmax(-1), log_target=True,
                    reduction="none").sum(-1).mean()  # fmt: skip


def divergence(loaded: LoadedModel, reference: Continuations) -> float:
    """Mean over prompts of KL(reference || this model) along the reference's continuations (nats a token)."""
    found = divergences(loaded, reference)
    return sum(found) / len(found)


@torch.no_grad()
def divergences(loaded: LoadedModel, reference: Continuations, bf16: bool | None = False) -> list[float]:
    """The same for each prompt.

    Raises:
        GuardError: where one is not a number.
    """
    logits = measured_logits(loaded, reference.rows, bf16)
    found = [float(row_divergence(target, row)) for target, row in zip(reference.logits, logits, strict=True)]
    if any(value != value for value in found):
        raise GuardError("the drift is not a number", seen=loaded.name, fix="lower the learning rate")
    return [max(value, 0.0) for value in found]
