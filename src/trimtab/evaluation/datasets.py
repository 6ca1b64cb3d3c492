"""Sets of prompts, bundled or external, each with a content hash.

Covered: the bundled requests and tickets; the usual safety sets by name, from a local file or from the hub; questions
with answers from JSON Lines; a deterministic subset by ``limit``.
Not covered: the texts themselves (external sets are never part of this package; their licences differ), chat templates.

A local file always wins: where a path is given the hub is not asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, UsageError
from trimtab.evaluation.catalogue import BUNDLED, CATALOGUE, Source
from trimtab.evaluation.choices import options
from trimtab.evaluation.files import Row, pick, read_rows

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One thing to ask.

    Attributes:
        id: stable; two runs are paired on it. Where a set has none it is a hash of the text, so it survives reordering.
        category: "" where the set has none.
        text: the user's words (of a conversation: the last user turn).
        system: system prompt, or "".
        history: earlier turns, oldest first, alternating user and assistant.
        target: the right answer, for questions; "" otherwise.
        choices: the allowed answers, for classification.
        opening: the beginning of an answer that the model has to continue, or "".
        request: what is really wanted, where ``text`` dresses it up; "" where they are the same.
    """

    id: str
    category: str
    text: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    target: str = ""
    choices: tuple[str, ...] = ()
    opening: str = ""
    request: str = ""

    @property
    def messages(self) -> list[Message]:
        """The chat, ready for a template."""
        turns = [("system", self.system)] if self.system else []
        begun = [("assistant", self.opening)] if self.opening else []
        whole = [*turns, *self.history, ("user", self.text), *begun]
        return [{"role": role, "content": content} for role, content in whole]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a name ("bundled/eval/harmful", "advbench"), where they came from, and what they contain."""

    name: str
    prompts: tuple[Prompt, ...]
    revision: str = ""

    @property
    def sha256(self) -> str:
        """Hash of ids, texts, targets and choices in order (16 hex digits): equal hash, equal questions."""
        rows = [(p.id, p.category, p.messages, p.target, p.choices) for p in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """``name@revision@sha256:...`` as comparisons record it."""
        return "@".join(filter(None, (self.name, self.revision, f"sha256:{self.sha256}")))

    def limited(self, limit: int | None) -> PromptSet:
        """At most ``limit`` prompts: those whose hashed ids come first, in the set's own order.

        So a subset spreads over the categories, is the same every time, and a smaller one lies within a larger one.
        """
        if limit is None or limit >= len(self.prompts):
            return self
        if limit < 1:
            raise UsageError("a limit must be at least 1", seen=limit, fix="leave it out to take all")
        chosen = set(
            sorted((p.id for p in self.prompts), key=lambda key: hashlib.sha256(key.encode()).digest())[:limit]
        )
        return replace(self, name=f"{self.name}[{limit}]", prompts=tuple(p for p in self.prompts if p.id in chosen))


def load_prompts(
    name: str = "bundled",
    *,
    side: str = "harmful",
    split: str = "eval",
    path: str | Path | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> PromptSet:
    """Load a set of prompts.

    Args:
        name: "bundled", or a name in ``catalogue.CATALOGUE``, or, with ``path``, any name for a file of prompts.
        side: of the bundled set: "harmful" or "benign".
        split: of the bundled set: "train" or "eval".
        path: local file or folder; the hub is then never asked.
        revision: commit of the hub's data set to pin.
        limit: at most so many prompts.

    Raises:
        DataError: missing file, malformed file, missing column (names the ones seen), empty set.
        UsageError: unknown name.
    """
    if path is not None:
        source = CATALOGUE.get(name, Source())
        found = from_rows(name, read_rows(Path(path)), source, where=str(path))
    elif name == "bundled":
        found = bundled_requests(side=side, split=split)
    elif name in CATALOGUE:
        found = from_hub(name, CATALOGUE[name], revision)
    else:
        fix = f"use bundled, {', '.join(CATALOGUE)}, or give a path"
        raise UsageError("unknown set of prompts", seen=name, fix=fix)
    return found.limited(limit)


def load_questions(path: str | Path, *, name: str = "", limit: int | None = None) -> PromptSet:
    """Load questions with answers from JSON Lines (or CSV).

    Columns: ``prompt`` (or ``question``, ``text``) or ``messages``; ``answer`` (or ``label``, ``completion``), or a
    closing assistant turn in ``messages``; optional ``choices`` (``choices.py`` says in which layouts), ``category``
    (or ``subject``), ``id``, ``system``. A folder of files is one set, a file's name its category (MMLU).

    Raises:
        DataError: as ``load_prompts``.
    """
    rows = read_rows(Path(path))
    prompts = [_question(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return PromptSet(name or Path(path).stem, _unique_ids(name or Path(path).stem, prompts)).limited(limit)


def ticket_system(labels: Sequence[str]) -> str:
    """The system message of the bundled task; a ticket is the user's turn. Training must use the same words."""
    return f"Route the message to {', '.join(labels[:-1])} or {labels[-1]}."


def bundled_tickets(*, split: str = "eval", limit: int | None = None) -> PromptSet:
    """The bundled classification task: support tickets with one label each."""
    rows = _bundled_rows("tickets.jsonl")
    labels = sorted({str(row["label"]) for row in rows})
    prompts = tuple(
        Prompt(
            str(row["id"]),
            str(row["label"]),
            row["text"],
            ticket_system(labels),
            target=row["label"],
            choices=tuple(labels),
        )
        for row in rows
        if row["split"] == split
    )
    return _not_empty(PromptSet(f"bundled/tickets/{split}", prompts), f"split {split!r}").limited(limit)


def bundled_requests(*, side: str, split: str) -> PromptSet:
    """The bundled pairs of a harmful request and an innocent one that looks like it; one side of them."""
    if side not in ("harmful", "benign"):
        raise UsageError("unknown side of the bundled requests", seen=side, fix="use harmful or benign")
    rows = _bundled_rows("requests.jsonl")
    prompts = tuple(Prompt(str(row["id"]), str(row["category"]), row[side]) for row in rows if row["split"] == split)
    return _not_empty(PromptSet(f"bundled/{split}/{side}", prompts), f"split {split!r}")


def from_rows(name: str, rows: Sequence[Row], source: Source, *, where: str, revision: str = "") -> PromptSet:
    """Prompts from rows by the columns of a source; rows that its filter refuses are left out."""
    kept = [row for row in rows if source.keep(row)]
    prompts: list[Prompt] = []
    asked: set[str] = set()
    for number, row in enumerate(kept, 1):
        text = _only_turn(pick(row, source.prompt), f"{where}, row {number}")
        if text is None:
            raise _missing_column(row, source.prompt, f"{where}, row {number}")
        if source.distinct and text in asked:
            continue
        asked.add(text)
        context = pick(row, source.context)
        category = _category(pick(row, (*source.category, "_file")))
        words = f"{context}\n\n---\n\n{text}" if context else str(text)
        prompts.append(Prompt(str(pick(row, source.id) or ""), category, words.strip()))
    found = PromptSet(name, _unique_ids(name, prompts), revision)
    return _not_empty(found, f"{where}: {len(rows)} rows, none kept for {name}")


def _only_turn(value: Any, where: str) -> str | None:
    """A request as text; SORRY-Bench keeps it as a conversation of one turn."""
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError("a request of several turns", seen=f"{where}: {len(value)} turns", fix="keep one a row")
        value = value[0]
    return None if value is None else str(value)


def _category(value: Any) -> str:
    """A category as text; BeaverTails marks each of its categories true or false, the first true one counts."""
    if isinstance(value, dict):
        return next((str(name) for name, holds in value.items() if holds), "")
    return str(value or "")


def from_hub(name: str, source: Source, revision: str | None) -> PromptSet:
    """Prompts from the hub, at a pinned commit (the commit is looked up where none is given, and recorded)."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    fix = "check the network and `hf auth login` (some sets are gated), or download the file and give its path"
    try:
        commit = HfApi().dataset_info(source.hub, revision=revision).sha or ""
        table = datasets.load_dataset(
            source.hub, source.config or None, split=source.split, revision=commit or revision
        )
        rows: list[Row] = [dict(row) for row in table]
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        reason = f"{source.hub}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        raise DataError(f"could not get {name} from the hub", seen=reason[:300], fix=fix) from error
    return from_rows(name, rows, source, where=source.hub, revision=commit[:12])


def _bundled_rows(file: str) -> list[Row]:
    with as_file(files(BUNDLED) / file) as path:
        if not path.is_file():
            raise DataError("the packaged prompts are missing", seen=file, fix="reinstall trimtab")
        return read_rows(path)


def _question(row: Row, where: str) -> Prompt:
    turns = _turns(row, where) if row.get("messages") else []
    text = pick(row, ("prompt", "question", "text", "input", "dialogue"))
    target = pick(row, ("answer", "label", "completion", "target", "summary", "summary1"))
    if turns and target is None and turns[-1][0] == "assistant":
        target = turns.pop()[1]
    if turns:
        system = " ".join(content for role, content in turns if role == "system")
        turns = [turn for turn in turns if turn[0] != "system"]
        if not turns or turns[-1][0] != "user":
            raise DataError(
                "a conversation does not end with the user",
                seen=where,
                fix="end it with the user's message, which the model answers",
            )
        text, history = turns[-1][1], tuple(turns[:-1])
    else:
        system, history = str(row.get("system") or ""), ()
    if text is None:
        raise _missing_column(row, ("prompt", "messages"), where)
    if target is None:
        raise _missing_column(row, ("answer", "label", "completion"), where)
    choices, answer = options(row, target, where)
    category = str(pick(row, ("category", "subject", "_file")) or "")
    return Prompt(str(row.get("id") or ""), category, str(text), system, history, answer, choices)


def _turns(row: Row, where: str) -> list[tuple[str, str]]:
    try:
        return [(str(turn["role"]), str(turn["content"])) for turn in row["messages"]]
    except (TypeError, KeyError) as error:
        fix = 'write "messages": [{"role": "user", "content": "..."}]'
        raise DataError("malformed messages", seen=where, fix=fix) from error


def _missing_column(row: Row, wanted: Sequence[str], where: str) -> DataError:
    seen = f"{where}; columns: {', '.join(str(key) for key in row if key != '_file')}"
    return DataError(
        f"no value in any of the columns {', '.join(wanted)}", seen=seen, fix="rename the column that holds it"
    )


def _unique_ids(name: str, prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """Fill empty ids from the text; number what still repeats."""
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        key = prompt.id or f"{name}-{hashlib.sha256(json.dumps(prompt.messages).encode()).hexdigest()[:10]}"
        seen[key] = seen.get(key, 0) + 1
        result.append(replace(prompt, id=key if seen[key] == 1 else f"{key}#{seen[key]}"))
    return tuple(result)


def _not_empty(found: PromptSet, seen: str) -> PromptSet:
    if not found.prompts:
        raise DataError(
            "that set of prompts is empty: nothing would be measured", seen=seen, fix="choose another split or file"
        )
    return found
