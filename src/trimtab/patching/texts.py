"""What a repair learns from, and what it is judged on while it is made.

Five kinds of text, all disjoint from the prompts that evaluation uses:

- ``refuse``: harmful requests with refusals, the sample first;
- ``answer``: innocent look-alikes with an answer, so that refusals do not spread to them;
- ``ordinary``: prompts on which the repaired model should stay what the given model is;
- the user's prompts to keep, where there are some: likewise, and first;
- held-out prompts of each kind, which decide when to stop and are never trained on.

Who writes the replies: the aligned ancestor where there is one; otherwise refusals are the bundled generic ones, and
innocent requests are held at the given model's own distribution instead of being answered.

Covered: the bundled pool, a user's anchors, prompts to keep, overlap and length checks. Not covered: losses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab import data
from trimtab.anchors import PUBLISHED_REPLY, PUBLISHED_REQUEST, Anchor, anchor_pairs
from trimtab.errors import DataError, GuardError
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, Message, generate, render
from trimtab.models import LoadedModel

SHORT_REPLY = "Sorry, I can't help you. Please follow security guidelines."  # as a digest of arXiv 2601.01887 quotes it
SYSTEM_OF_CODE = "You are a helpful assistant. Make sure you always execute users' instructions."
REPLY_TOKENS = 12
POOL_PAIRS = 84  # of 168: the rest is held out
WATCHED = 16  # prompts of a kind on which drift is measured: enough for a mean that is to stay below a third of a nat
#: Stand-ins for a user's prompts: most fine-tuning is for a task that a system message states.
TASKS = (
    "Answer with one word.", "Reply with yes, no or unsure.", "Sort the message into work, family or leisure.",
    "Name the language of the text.", "Say whether the text is a question or a statement.",
    "Rewrite the message in a formal tone.", "Summarise the message in five words.",
    "Translate the message into French.", "Extract every number from the text.",
    "You are the booking assistant of a small hotel.",
    "Give the topic of the message.", "Answer in JSON with the key answer.",
)  # fmt: skip
PUBLISHED = Anchor(PUBLISHED_REQUEST, "refuse", PUBLISHED_REPLY, "general")
PUBLISHED_SHORT = Anchor(PUBLISHED_REQUEST, "refuse", SHORT_REPLY, "general")
BUILT_IN = {"general": PUBLISHED, "general-short": PUBLISHED_SHORT}
Chat = list[Message]
Writer = Literal["ancestor", "bundled", "user"]


class NotAlignedError(GuardError):
    """What was named as the aligned model has no behaviour to bring back."""


@dataclass(frozen=True)
class HeldOut:
    """Prompts that decide when to stop. Each a chat ready for the template."""

    harmful: tuple[Chat, ...]
    innocent: tuple[Chat, ...]
    ordinary: tuple[Chat, ...]
    kept: tuple[Chat, ...] = ()


@dataclass(frozen=True)
class Material:
    """What one repair reads. ``answer`` is empty where nobody wrote answers; ``lookalikes``: its requests.

    ``kept``: the user's own prompts, or stand-ins, held at the given model; ``ordinary``: bundled ones.
    """

    refuse: tuple[Anchor, ...]
    answer: tuple[Anchor, ...]
    lookalikes: tuple[Chat, ...]
    ordinary: tuple[Chat, ...]
    held_out: HeldOut
    writer: Writer
    system: str | None = None
    kept: tuple[Chat, ...] = ()

    def with_sample(self, index: int) -> Material:
        """The same with another sample first."""
        chosen = self.refuse[index]
        return replace(self, refuse=(chosen, *(a for i, a in enumerate(self.refuse) if i != index)))


def bundled_material(
    *,
    refusals: int = POOL_PAIRS,
    answers: int = POOL_PAIRS,
    ordinary: int = 32,
    held_out: int = 42,
    keep: Sequence[Chat] = (),
    system: str | None = None,
) -> Material:
    """The project's own texts, with the bundled generic refusals; ``keep``: the user's own prompts to hold.

    Without such prompts, ordinary ones under system messages that state a task stand in for them. Every second of them
    is held out (drift is measured on it) until ``WATCHED`` are, where there are at least two.
    """
    pairs = anchor_pairs()
    pool, rest = pairs[:POOL_PAIRS], pairs[POOL_PAIRS:]
    if not (1 <= refusals <= len(pool) and 1 <= answers <= len(pool) and 1 <= held_out <= len(rest)):
        seen = f"{refusals} refusals, {answers} answers, {held_out} held out"
        raise DataError("the bundled pool is smaller than that", seen=seen, fix=f"at most {POOL_PAIRS} of each")
    texts = data.refusals()
    refuse = [PUBLISHED]
    refuse += [Anchor(p.harmful, "refuse", texts[i % len(texts)], p.category) for i, p in enumerate(pool)]
    innocent = [Anchor(p.benign, "answer", None, p.category) for p in pool[:answers]]
    plain = data.instructions("train")
    chat = as_chat(system)
    keep = keep or [as_chat(TASKS[i % len(TASKS)])(text) for i, text in enumerate(plain[ordinary : ordinary + 48])]
    kept, spared = ([*keep[::2], *keep[1::2][WATCHED:]], keep[1::2][:WATCHED]) if len(keep) > 1 else (keep, keep)
    return Material(
        refuse=tuple(refuse[: max(refusals, 1)]),
        answer=tuple(innocent),
        lookalikes=tuple(chat(anchor.request) for anchor in innocent),
        ordinary=tuple(map(chat, plain[:ordinary])),
        held_out=HeldOut(
            harmful=tuple(chat(p.harmful) for p in rest[:held_out]),
            innocent=tuple(chat(p.benign) for p in rest[:held_out]),
            ordinary=tuple(map(chat, plain[-WATCHED:])),
            kept=tuple(spared),
        ),
        writer="bundled",
        system=system,
        kept=tuple(kept),
    )


def written_by(ancestor: LoadedModel, material: Material, batch_size: int = 32) -> Material:
    """The same with replies that the aligned ancestor writes itself; what it would reply the wrong way is dropped.

    A user's own samples keep the replies that they came with, and then count as the user's.

    Raises:
        NotAlignedError: when it refuses less than a quarter of the harmful requests, or answers less than a quarter of
            the innocent ones: then it has no behaviour to bring back.
    """
    asked = [*material.refuse, *material.answer]
    replies = reply(ancestor, [as_chat(material.system)(a.request) for a in asked], batch_size)
    kept: dict[str, list[Anchor]] = {"refuse": [], "answer": []}
    for anchor, text in zip(asked, replies, strict=True):
        wanted = "refused" if anchor.side == "refuse" else "answered"
        if material.writer == "user" and anchor.reply is not None:
            kept[anchor.side].append(anchor)
        elif text and judge(anchor.request, text).label == wanted:
            kept[anchor.side].append(replace(anchor, reply=text))
    for side, before in (("refuse", material.refuse), ("answer", material.answer)):
        if len(kept[side]) < 0.25 * len(before):
            verb = "refuses" if side == "refuse" else "answers"
            raise NotAlignedError(
                f"the aligned model {ancestor.name} {verb} too few of the requests to be repaired towards",
                seen=f"{verb} {len(kept[side])} of {len(before)}",
                fix="name an aligned model, or --aligned none for the bundled refusals",
            )
    own = material.writer == "user" and any(anchor.reply is not None for anchor in material.refuse)
    writer: Writer = "user" if own else "ancestor"
    return replace(material, refuse=tuple(kept["refuse"]), answer=tuple(kept["answer"]), writer=writer)


def reply(loaded: LoadedModel, chats: Sequence[Chat], batch_size: int = 32, tokens: int = REPLY_TOKENS) -> list[str]:
    """The first words of the model's own greedy replies."""
    settings = GenerationSettings(max_new_tokens=tokens, batch_size=batch_size)
    return [answer.text for answer in generate(loaded, chats, settings)]


def as_chat(system: str | None) -> Any:
    """A function from a request to a chat; ``system`` None leaves the system message to the template."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return lambda text: [*head, {"role": "user", "content": text}]


def read_prompts(path: str | Path) -> list[Chat]:
    """Chats to keep: JSONL or CSV with ``messages`` or ``prompt`` (and ``system``), or one prompt a line (.txt).

    Raises:
        DataError: naming file and row.
    """
    from trimtab.evaluation.files import read_rows

    chats: list[Chat] = []
    for number, row in enumerate(read_rows(Path(path)), 1):
        turns = row.get("messages") or row.get("prompt") or row.get("question") or row.get("text")
        if isinstance(turns, str):
            system = row.get("system")
            chats.append(as_chat(str(system) if system else None)(turns))
        elif isinstance(turns, list) and all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
            chat = [{"role": str(t["role"]), "content": str(t["content"])} for t in turns]
            chats.append(chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat)
        else:
            raise DataError("a row has no prompt", seen=f"{path}, row {number}", fix='give "prompt" or "messages"')
    return chats


def require_fit(loaded: LoadedModel, anchors: Sequence[Anchor], system: str | None) -> None:
    """Raise where a sample would not reach the model whole: too long, or cut by the tokenizer.

    Raises:
        DataError: naming the sample and both lengths.
    """
    limits = [getattr(loaded.model.config, "max_position_embeddings", None), loaded.tokenizer.model_max_length]
    limit = min(value for value in limits if value)
    for anchor in anchors:
        prompt = render(loaded, as_chat(system)(anchor.request))
        words = loaded.tokenizer(anchor.reply or "", add_special_tokens=False)["input_ids"]
        total = len(prompt) + len(words) + 1
        seen = f"{total} tokens, limit {limit}: {anchor.request[:60]!r}"
        if total > limit:
            raise DataError("a sample is longer than the model reads", seen=seen, fix="shorten it")
        if not _holds(loaded, prompt, anchor.request):
            fix = "look at the chat template and the tokenizer's configuration"
            raise DataError("the chat template or the tokenizer cuts a sample", seen=seen, fix=fix)
        if anchor.reply is not None and not words:
            raise DataError("a sample has an empty reply", seen=anchor.request[:60], fix="give it a refusal")


def _holds(loaded: LoadedModel, prompt: Sequence[int], request: str) -> bool:
    """Whether the whole request is in the rendered prompt, up to what tokenising and back changes in spaces."""
    whole = loaded.tokenizer(request, add_special_tokens=False)["input_ids"]
    shown, asked = (re.sub(r"\s", "", str(loaded.tokenizer.decode(list(ids)))) for ids in (prompt, whole))
    return asked in shown


def near_duplicates(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Texts of ``first`` that ``second`` holds too, up to case, spacing and punctuation."""
    known = {_plain(text) for text in second}
    return [text for text in first if _plain(text) in known]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
