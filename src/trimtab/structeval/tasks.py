"""The StructEval data set: 2,035 tasks, 44 task types, 18 formats.

Covered: the hub's set or a local JSON or JSON Lines file in its schema; filters by split, format and task; the official
prompt. Not covered: the rows themselves (they are loaded, never shipped), defects in them (``defects.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.errors import DataError, UsageError

HUB_ID = "TIGER-Lab/StructEval"
DATA_VARIABLE = "TRIMTAB_STRUCTEVAL"  # a local file that stands for the hub's set

Split = Literal["t-gen", "t-conv", "v-gen", "v-conv"]
SPLITS: tuple[Split, ...] = ("t-gen", "t-conv", "v-gen", "v-conv")
TEXT_FORMATS = ("json", "yaml", "toml", "xml", "csv")
RENDERED_FORMATS = (
    "html", "react", "vue", "angular", "svg", "canvas", "latex", "tikz", "markdown", "matplotlib", "mermaid", "typst",
    "vega",
)  # fmt: skip
FORMATS = TEXT_FORMATS + RENDERED_FORMATS
_CODES = {
    "00": "text", "01": "angular", "02": "csv", "03": "canvas", "04": "html", "05": "json", "06": "latex",
    "07": "markdown", "08": "matplotlib", "09": "mermaid", "10": "toml", "11": "react", "12": "svg", "13": "tikz",
    "14": "typst", "15": "vega", "16": "vue", "17": "xml", "18": "yaml",
}  # fmt: skip
_INSTRUCTION = (
    "IMPORTANT: Only output the required output format. You must start the format/code with <|BEGIN_CODE|> and end the "
    "format/code with <|END_CODE|>. No other text output (explanation, comments, etc.) are allowed. Do not use "
    "markdown code fences."
)


class Question(NamedTuple):
    """A question about the picture and the answer that it should get."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        id: six characters: input code, output code, number.
        name: the task type, e.g. "Text to JSON", "Convert HTML to Vue".
        query: what is asked, without the wrapper.
        input_format: lower case; "text" for generation.
        output_format: lower case, one of ``FORMATS``.
        rules: key paths (text formats) or keywords (rendered ones).
        questions: about the picture; empty for text formats.
        rendered: does the output render?
    """

    id: str
    name: str
    query: str
    input_format: str
    output_format: str
    rules: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    rendered: bool = False
    requirements: str = field(default="", repr=False)

    @property
    def split(self) -> Split:
        """The quadrant: text or rendered output, generation or conversion."""
        kind = "gen" if self.input_format == "text" else "conv"
        return f"{'v' if self.rendered else 't'}-{kind}"  # type: ignore[return-value]

    @property
    def prompt(self) -> str:
        """The query in the official wrapper: the one user turn that a model gets."""
        return f"{self.query}\n\n{_INSTRUCTION}"

    @property
    def source(self) -> str | None:
        """The document to convert; None for generation tasks."""
        _, opened, rest = self.query.partition("<code>")
        if not opened or self.input_format == "text":
            return None
        return rest.rpartition("</code>")[0] or rest  # five tasks lack the closing tag


def format_name(name: str) -> str:
    """A format's name in lower case; "Latex", "TikZ" and "Vega-Lite" in the spellings that occur."""
    plain = name.strip().lower()
    return {"vega-lite": "vega", "vegalite": "vega", "tex": "latex", "yml": "yaml"}.get(plain, plain)


def formats_of_id(task_id: str) -> tuple[str, str]:
    """Input and output format by the codes in a task's id; "" for ``XX`` and unknown codes."""
    return _CODES.get(task_id[:2], ""), _CODES.get(task_id[2:4], "")


def load(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    splits: Sequence[str] = (),
    formats: Sequence[str] = (),
    names: Sequence[str] = (),
    limit: int | None = None,
) -> list[Task]:
    """Load tasks and filter them.

    Args:
        source: a JSON or JSON Lines file in the data set's schema; by default the file that the variable
            ``TRIMTAB_STRUCTEVAL`` names, else the hub's set.
        revision: commit of the hub's set to pin.
        splits: "t-gen", "t-conv", "v-gen", "v-conv", or "t", "v", "gen", "conv"; none means all.
        formats: output formats. names: task types ("Text to JSON", "JSON->YAML") or ids.
        limit: at most so many, spread over the task types by the hash of their ids.

    Raises:
        DataError: missing or malformed file, the hub not reachable.
        UsageError: an unknown split or format, nothing left.
    """
    path = source or os.environ.get(DATA_VARIABLE)
    rows = read_rows(Path(path)) if path else _hub_rows(revision)
    tasks = [task_from_row(row, f"{path or HUB_ID}, row {number}") for number, row in enumerate(rows, 1)]
    return choose(tasks, splits=splits, formats=formats, names=names, limit=limit)


def choose(
    tasks: Iterable[Task],
    *,
    splits: Sequence[str] = (),
    formats: Sequence[str] = (),
    names: Sequence[str] = (),
    limit: int | None = None,
) -> list[Task]:
    """Filter tasks; arguments and errors as in ``load``."""
    wanted_splits = {split for asked in splits for split in _splits_named(asked)}
    wanted_formats = {format_name(name) for name in formats}
    if unknown := wanted_formats - set(FORMATS):
        raise UsageError("unknown format", seen=", ".join(sorted(unknown)), fix=f"use one of: {', '.join(FORMATS)}")
    wanted_names = {_task_name(name) for name in names}
    left = [
        task
        for task in tasks
        if (not wanted_splits or task.split in wanted_splits)
        and (not wanted_formats or task.output_format in wanted_formats)
        and (not wanted_names or task.id.lower() in wanted_names or _task_name(task.name) in wanted_names)
    ]
    if not left:
        asked = {"splits": list(splits), "formats": list(formats), "tasks": list(names)}
        raise UsageError("no task is left", seen=asked, fix="loosen the filters, or name a file that has such tasks")
    return spread(left, limit)


def spread(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most ``limit`` tasks, as evenly as possible over the task types; a smaller choice lies within a larger one."""
    if limit is None or limit >= len(tasks):
        return list(tasks)
    if limit < 1:
        raise UsageError("a limit must be at least 1", seen=limit, fix="leave it out to take all")
    by_name: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode()).digest()):
        by_name.setdefault(task.name, []).append(task)
    ranked = sorted((rank, name, task.id) for name, group in by_name.items() for rank, task in enumerate(group))
    chosen = {task_id for _, _, task_id in ranked[:limit]}
    return [task for task in tasks if task.id in chosen]


def task_from_row(row: Mapping[str, Any], where: str) -> Task:
    """A task from a row in the data set's schema.

    Raises:
        DataError: a column that is missing or of the wrong type.
    """
    try:
        output = format_name(str(row["output_type"]))
        rules = tuple(str(rule) for rule in row["raw_output_metric"])
        questions = tuple(Question(str(pair["question"]), str(pair["answer"])) for pair in row.get("VQA") or ())
        task = Task(
            id=str(row["task_id"]),
            name=str(row["task_name"]),
            query=str(row["query"]),
            input_format=format_name(str(row["input_type"])),
            output_format=output,
            rules=rules,
            questions=questions,
            rendered=bool(row.get("rendering", output in RENDERED_FORMATS)),
            requirements=str(row.get("feature_requirements") or ""),
        )
    except (KeyError, TypeError) as error:
        fix = "columns needed: task_id, task_name, query, input_type, output_type, raw_output_metric"
        raise DataError("a row is not a StructEval task", seen=f"{where}: {error!r}", fix=fix) from error
    if task.output_format not in FORMATS:
        raise DataError("unknown output format", seen=f"{where}: {row['output_type']!r}", fix=", ".join(FORMATS))
    return task


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON array, or of JSON Lines.

    Raises:
        DataError: missing, not text, malformed (with the line), or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read that file", seen=path, fix=f"check the path ({error})") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(
                "that file is not JSON", seen=f"{path}: {error}", fix="mend it, or write one task a line"
            ) from error
    else:
        rows = [_line(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError("that file holds no rows", seen=path, fix="give a JSON array of objects, or JSON Lines")
    return list(rows)


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        fix = "one JSON object a line, or one JSON array; a cut last line can be deleted"
        raise DataError("a line is not JSON", seen=f"{where}: {error}", fix=fix) from error


def _hub_rows(revision: str | None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(HUB_ID, split="test", revision=revision)]
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had
        fix = f"name a local copy (--dataset FILE, or the variable {DATA_VARIABLE}), or connect to the hub once"
        raise DataError("cannot load StructEval from the hub", seen=f"{HUB_ID}: {error}"[:300], fix=fix) from error


def _splits_named(asked: str) -> list[Split]:
    found = [split for split in SPLITS if asked.lower().replace("_", "-") in (split, *split.split("-"))]
    if not found:
        raise UsageError("unknown split", seen=asked, fix=f"use one of: {', '.join(SPLITS)}, t, v, gen, conv")
    return found


def _task_name(name: str) -> str:
    return name.lower().replace("->", " to ").replace("convert ", "").replace("  ", " ").strip()
