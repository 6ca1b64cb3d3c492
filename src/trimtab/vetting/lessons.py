"""What hardening by self-distillation teaches: replies and texts in the exact model's own words, with their targets.

Covered: the bundled requests of both sides with the model's own replies, right and wrong ones; ordinary texts; drawing
rows with their targets; keeping all that for a run that is interrupted. Not covered: losses and training
(``distill.py``).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from tqdm.auto import tqdm

from trimtab import data
from trimtab.anchors import SIDES, Anchor
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, fitting_rows, generate, generate_ids, render
from trimtab.models import LoadedModel
from trimtab.tuning.distill import REPLY_TOKENS, require_alignment
from trimtab.tuning.likely import Likely
from trimtab.tuning.pools import AnchorReader, TokenisedAnchor, tokenise
from trimtab.vetting.progress import Progress

TEXT_TOKENS = 48


class LessonSettings(Protocol):
    """What of a run's settings matters here: requests of a side, texts, first tokens compared, and the draw."""

    @property
    def pairs(self) -> int: ...
    @property
    def texts(self) -> int: ...
    @property
    def reply_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Lesson(NamedTuple):
    """Rows with what the exact model says on them, and an order to take them in."""

    rows: list[TokenisedAnchor]
    likely: Likely
    order: random.Random

    def some(self, count: int) -> tuple[list[TokenisedAnchor], Likely]:
        """So many, drawn without replacement."""
        chosen = self.order.sample(range(len(self.rows)), min(count, len(self.rows)))
        rows = [self.rows[index] for index in chosen]
        return rows, self.likely.of(chosen, max(len(row.reply) for row in rows))


def kept_lessons(loaded: LoadedModel, settings: LessonSettings, progress: Progress) -> dict[str, Lesson]:
    """The lessons of an interrupted run, or new ones, kept as token ids."""
    kept = progress.kept("lessons")
    if kept is None:
        lessons = make_lessons(loaded, settings)
        kept = {name: ([tuple(row) for row in one.rows], tuple(one.likely)) for name, one in lessons.items()}
        progress.keep("lessons", kept)
        return lessons
    return {
        name: Lesson(
            [TokenisedAnchor(*row) for row in rows],
            Likely(*(part.to(loaded.device) for part in likely)),
            _order(settings, name),
        )
        for name, (rows, likely) in kept.items()
    }


def _order(settings: LessonSettings, name: str) -> random.Random:
    return random.Random(f"{settings.seed}|{name}")


def make_lessons(loaded: LoadedModel, settings: LessonSettings) -> dict[str, Lesson]:
    """Replies to both sides and texts, all in the exact model's own words, each with what it would say."""
    rows = {**_replies(loaded, settings), "text": _texts(loaded, settings)}
    reader = AnchorReader(loaded.model, padding(loaded), share=False)
    return {name: Lesson(own, reader.likely(own), _order(settings, name)) for name, own in rows.items()}


def _replies(loaded: LoadedModel, settings: LessonSettings) -> dict[str, list[TokenisedAnchor]]:
    """The model's own replies, the wrong ones too: what it does where it is undecided is to stay as it is.

    Raises:
        GuardError: a model that refuses or answers too little to have a behaviour worth keeping.
    """
    anchors = _requests(settings)
    chats = [[{"role": "user", "content": anchor.request}] for anchor in anchors]
    wanted = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=fitting_rows(loaded))
    with _bar(f"replies of {loaded.name}", len(chats)) as bar:
        answers = generate(loaded, chats, wanted, bar.update)
    replied = [
        replace(anchor, reply=answer.text) for anchor, answer in zip(anchors, answers, strict=True) if answer.text
    ]
    right = {"refuse": "refused", "answer": "answered"}
    kept = [one for one in replied if judge(one.request, one.reply or "").label == right[one.side]]
    require_alignment(loaded.name, kept, Counter(anchor.side for anchor in anchors))
    return {
        side: [tokenise(loaded, one, None, settings.reply_tokens) for one in replied if one.side == side]
        for side in SIDES
    }


def _requests(settings: LessonSettings) -> list[Anchor]:
    """Bundled training requests: harmful ones and as many innocent ones, two thirds of them their twins."""
    known = data.requests("train")
    pairs = random.Random(settings.seed).sample(known, min(settings.pairs, len(known)))
    innocent = [pair.benign for pair in pairs]
    for place, text in zip(range(2, len(innocent), 3), data.instructions("train")[settings.texts :], strict=False):
        innocent[place] = text
    return [Anchor(pair.harmful, "refuse") for pair in pairs] + [Anchor(text, "answer") for text in innocent]


def _texts(loaded: LoadedModel, settings: LessonSettings) -> list[TokenisedAnchor]:
    """Ordinary instructions with the model's answers, and plain texts that begin as they do, half and half."""
    asked = data.instructions("train")[: settings.texts]
    chats = [render(loaded, [{"role": "user", "content": text}]) for text in asked[::2]]
    plain = [loaded.tokenizer(text)["input_ids"] for text in asked[1::2]]
    return [*_written(loaded, chats, 0.0, settings.seed), *_written(loaded, plain, 1.0, settings.seed)]


def unseen_texts(loaded: LoadedModel, settings: LessonSettings) -> list[TokenisedAnchor]:
    """Plain texts as those of the lessons, of another draw: no lesson holds them.

    Their beginnings are instructions that begin no text of the lessons, though some are requests there; where the
    lessons' texts take all instructions, the draw alone is new.
    """
    beginnings = data.instructions("train")[settings.texts :][: settings.texts] or data.instructions("train")
    plain = [loaded.tokenizer(text)["input_ids"] for text in beginnings]
    return _written(loaded, plain, 1.0, settings.seed + 1)


def _written(loaded: LoadedModel, beginnings: list[list[int]], temperature: float, seed: int) -> list[TokenisedAnchor]:
    """How the model goes on from each beginning."""
    wanted = GenerationSettings(TEXT_TOKENS, temperature, seed=seed, batch_size=32)
    with _bar(f"texts of {loaded.name}", len(beginnings)) as bar:
        answers = generate_ids(loaded, beginnings, wanted, bar.update)
    found = []
    for ids, answer in zip(beginnings, answers, strict=True):
        reply = loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        if reply and len(ids) > 1:
            found.append(TokenisedAnchor(ids, reply))
    return found


def _bar(what: str, count: int) -> tqdm[Any]:
    return tqdm(total=count, desc=what, unit="prompt")


def padding(loaded: LoadedModel) -> int:
    pad = loaded.tokenizer.pad_token_id
    return int(pad) if pad is not None else 0
