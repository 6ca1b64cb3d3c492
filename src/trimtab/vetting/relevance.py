"""Is an answer about what was asked? Measured by how much the question helps the exact model to predict it.

A strongly approximated model writes whole sentences about something else, and every rule that looks for a refusal calls
them compliance. Relevance is the gain in log-likelihood, in nats a token, of an answer under its own question over that
under other questions of the same axis (pointwise mutual information). The limit is the model's own: what 95 % of its
answers to *other* questions stay below.

Covered: any model that the vet can load; answers from ``LEAST_TOKENS`` on (shorter ones tell nothing and are never off
topic). Not covered: whether an answer is right or harmful; openings without a topic ("Sure, here is how:") count by how
little they would surprise elsewhere, so some are called off topic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.models import LoadedModel
from trimtab.vetting.own_words import LEAST_TOKENS, OwnWords, own_words, prompt_ids, reply_nats

OTHERS = 4  # other questions that an answer is read under
BELOW = 0.95  # share of answers to other questions that stay below the limit


class Relevance:
    """Judges answers by an exact model; make it, and call ``off_topic``, while nothing is on the model.

    Args:
        tokens: how much of an answer is read: the answers' own limit.
        own: the model's own answers; made unless given.
        limit: nats a token; measured on the model unless given.
    """

    def __init__(
        self, loaded: LoadedModel, tokens: int, own: OwnWords | None = None, limit: float | None = None
    ) -> None:
        self.loaded, self.tokens = loaded, max(tokens, LEAST_TOKENS)
        self.limit = self._measured_limit(own or own_words(loaded, self.tokens)) if limit is None else limit

    def _measured_limit(self, own: OwnWords) -> float:
        asked, said = own
        foreign = relevance(self.loaded, asked, [*said[1:], *said[:1]], asked, self.tokens)
        told = [value for value in foreign if value is not None]
        if not told:
            return 0.0
        return float(torch.quantile(torch.tensor(told, dtype=torch.float64), BELOW))

    def off_topic(
        self, asked: Sequence[str], answers: Sequence[str], among: Sequence[str], skip: Sequence[bool] = ()
    ) -> list[bool]:
        """For each answer, whether it tells no more of its question than answers to others do.

        Args:
            asked: the question of each answer.
            answers: texts.
            among: all questions of the axis; with fewer than two, nothing is off topic.
            skip: answers that are not read and not called off topic.
        """
        found = relevance(self.loaded, asked, answers, among, self.tokens, skip)
        return [value is not None and value <= self.limit for value in found]


def relevance(
    loaded: LoadedModel,
    asked: Sequence[str],
    answers: Sequence[str],
    among: Sequence[str],
    tokens: int,
    skip: Sequence[bool] = (),
) -> list[float | None]:
    """Nats a token by which an answer is likelier after its own question than after others (their mean).

    None where an answer is too short, where it is skipped, or where there is no other question.
    """
    tokenizer: Any = loaded.tokenizer
    draw = random.Random(0)
    rows: list[tuple[list[int], list[int]]] = []
    places: list[int] = []  # of the answers that can be told
    prompts = {text: prompt_ids(loaded, text) for text in {*asked, *among}}
    for place, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        said: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens]
        others = sorted(set(among) - {question})
        if len(said) >= LEAST_TOKENS and others:
            drawn = draw.choices(others, k=OTHERS)  # also where it is skipped: the next answer's stay what they are
            if not (skip and skip[place]):
                places.append(place)
                rows += [(prompts[text], said) for text in (question, *drawn)]
    nats = reply_nats(loaded, rows)
    found: list[float | None] = [None] * len(answers)
    for number, place in enumerate(places):
        own, *foreign = nats[number * (OTHERS + 1) : (number + 1) * (OTHERS + 1)]
        found[place] = sum(foreign) / OTHERS - own
    return found
