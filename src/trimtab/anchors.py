"""Safety anchors: requests with the reply that the aligned model would give.

Two sides. ``refuse``: harmful requests, to be refused. ``answer``: innocent ones, most of them look-alikes, to be
answered; holding only the first side pays for safety with over-refusal.

Covered: the published sample, the bundled pool, a user's JSONL file. Not covered: writing the replies
(``tuning/distill.py``), losses on them (``tuning/pools.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from trimtab import data
from trimtab.errors import DataError

Side = Literal["refuse", "answer"]
SIDES: tuple[Side, ...] = ("refuse", "answer")
# The sample of the released code of arXiv 2601.10141 (data/tasks/pure_safe.jsonl): 17 label tokens under Llama 3.1.
PUBLISHED_REQUEST = "How can I bypass system security checks?"
PUBLISHED_REPLY = "Sorry, I can't help you bypass security checks. Please follow security guidelines."
ANCHORS_PER_CATEGORY = (
    12  # of 58 or more training pairs; the rest is left for experiments that train on harmful requests
)


@dataclass(frozen=True)
class Anchor:
    """A request with the reply that is to be kept.

    Attributes:
        request: what a user says.
        side: "refuse", to be refused, or "answer", to be answered.
        reply: the words; None: the aligned model writes it itself before training starts (self-distilled).
        category: a label, empty where there is none.
    """

    request: str
    side: Side
    reply: str | None = None
    category: str = ""


@dataclass(frozen=True)
class SafetyAnchors:
    """A pool of anchors. ``system``: system message of every anchor; None leaves it to the chat template."""

    anchors: tuple[Anchor, ...]
    origin: str
    system: str | None = None

    @classmethod
    def bundled(cls, per_side: int | None = None) -> SafetyAnchors:
        """The project's own pool: 168 harmful requests over 14 categories, 168 innocent ones (two thirds look-alikes).

        Args:
            per_side: take only so many of each side (1 to 168), spread evenly over the categories; None takes all.

        Raises:
            DataError: ``per_side`` below 1 or above 168.
        """
        pairs = anchor_pairs()
        refuse = [Anchor(pair.harmful, "refuse", category=pair.category) for pair in pairs]
        answer = [Anchor(pair.benign, "answer", category=pair.category) for pair in pairs]
        for place, text in zip(range(2, len(answer), 3), data.instructions("train"), strict=False):
            answer[place] = Anchor(text, "answer", category="instruction")
        if per_side is not None and not 1 <= per_side <= len(refuse):
            raise DataError(
                "the bundled pool has no such number of anchors a side", seen=per_side, fix=f"1 to {len(refuse)}"
            )
        return cls(anchors=(*refuse[:per_side], *answer[:per_side]), origin=f"bundled:{per_side or len(refuse)}")

    @classmethod
    def published(cls) -> SafetyAnchors:
        """The one sample of the SPF paper's released code, with its fixed reply."""
        return cls(anchors=(Anchor(PUBLISHED_REQUEST, "refuse", PUBLISHED_REPLY),), origin="published")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> SafetyAnchors:
        """Rows ``{"request": ..., "side": "refuse"|"answer", "reply": optional, "category": optional}``.

        Raises:
            DataError: naming the line.
        """
        anchors: list[Anchor] = []
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                "cannot read the anchor file", seen=f"{path}: {error}", fix="give a UTF-8 JSONL file"
            ) from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                anchors.append(_parse(line, f"{path}, line {number}"))
        if not anchors:
            raise DataError(
                "the anchor file holds no anchors",
                seen=path,
                fix='write one JSON object a line: {"request": ..., "side": "refuse"}',
            )
        return cls(anchors=tuple(anchors), origin=f"file:{Path(path).name}")

    def to_jsonl(self, path: str | Path) -> None:
        """Write the rows that ``from_jsonl`` reads, under a temporary name first; the system message is not written."""
        path = Path(path)
        rows = [{key: value for key, value in asdict(anchor).items() if value} for anchor in self.anchors]
        partial = path.with_name(f".{path.name}.part")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)

    def side(self, side: Side) -> tuple[Anchor, ...]:
        """The anchors of one side, in order."""
        return tuple(anchor for anchor in self.anchors if anchor.side == side)

    @property
    def sha256(self) -> str:
        """Content hash (64 hex digits) over requests, replies, sides and the system message."""
        content = json.dumps([self.system, *(asdict(anchor) for anchor in self.anchors)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def anchor_pairs() -> list[data.RequestPair]:
    """The training pairs that the bundled pool uses, interleaved so that any prefix is spread over the categories."""
    return data.interleaved(data.requests("train"), slice(ANCHORS_PER_CATEGORY))


def spare_pairs() -> list[data.RequestPair]:
    """The training pairs that no bundled anchor uses, interleaved by category."""
    return data.interleaved(data.requests("train"), slice(ANCHORS_PER_CATEGORY, None))


def _parse(line: str, where: str) -> Anchor:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        seen, fix = f"{line[:120]} ({error})", "write one JSON object a line"
        raise DataError(f"malformed JSON in the anchor file ({where})", seen=seen, fix=fix) from error
    known = {"request", "side", "reply", "category"}
    if not isinstance(row, dict) or not isinstance(row.get("request"), str) or not row["request"].strip():
        raise DataError(
            f'an anchor needs a "request" ({where})', seen=line[:120], fix='give each line a text as "request"'
        )
    if row.get("side") not in SIDES:
        raise DataError(
            f'an anchor\'s "side" is "refuse" or "answer" ({where})',
            seen=row.get("side"),
            fix="set it to one of the two",
        )
    if not isinstance(row.get("reply", ""), str | None) or not isinstance(row.get("category", ""), str):
        raise DataError(
            f'an anchor\'s "reply" and "category" are texts ({where})',
            seen=line[:120],
            fix="write texts, or leave them out",
        )
    if unknown := set(row) - known:
        raise DataError(f"unknown key in an anchor ({where})", seen=sorted(unknown), fix=f"known: {sorted(known)}")
    return Anchor(row["request"], cast(Side, row["side"]), row.get("reply"), row.get("category", ""))
