"""Files of generations: JSON or JSON Lines in the official schema, read, joined with their tasks, appended to.

Covered: rows that carry their task (the official evaluation files), rows with ``task_id`` and ``generation`` alone (the
task then comes from the data set), a cut last line after a crash, duplicates.
Not covered: making them (``generate.py``), scoring (``score.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trimtab.errors import DataError, UsageError
from trimtab.structeval import tasks as task_module
from trimtab.structeval.tasks import Task, task_from_row

_TASK_COLUMNS = ("query", "task_name", "input_type", "output_type", "raw_output_metric")


@dataclass(frozen=True)
class Generated:
    """A task and what a model wrote for it. ``recorded``: the other columns of its row, e.g. the reference's scores."""

    task: Task
    generation: str | None
    recorded: dict[str, Any] = field(default_factory=dict, repr=False)


def read(path: Path, *, dataset: str | None = None) -> list[Generated]:
    """Read generations and give each its task.

    Args:
        path: JSON array or JSON Lines.
        dataset: where tasks come from if the rows do not carry them; default as ``tasks.load``.

    Raises:
        DataError: malformed rows, an id twice, an id that the data set does not have.
    """
    rows = task_module.read_rows(path)
    ids = [str(row.get("task_id", "")) for row in rows]
    if "" in ids:
        raise DataError("a row has no task_id", seen=f"{path}, row {ids.index('') + 1}", fix="add task_id")
    if len(set(ids)) < len(ids):
        twice = sorted({task_id for task_id in ids if ids.count(task_id) > 1})
        seen = f"{path}: {', '.join(twice[:5])}"
        raise DataError("a task occurs twice in that file", seen=seen, fix="keep one generation for each task")
    for number, row in enumerate(rows, 1):
        if "generation" not in row:
            raise DataError("a row has no generation", seen=f"{path}, row {number}", fix='add "generation": "..."')
        if not isinstance(row["generation"], (str, type(None))):
            raise DataError("a generation is not text", seen=f"{path}, row {number}", fix="give a string or null")
    known = _known_tasks(rows, dataset)
    return [_joined(row, known, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _known_tasks(rows: Sequence[dict[str, Any]], dataset: str | None) -> dict[str, Task]:
    if dataset is None and all(_carries_task(row) for row in rows):
        return {}
    return {task.id: task for task in task_module.load(dataset)}


def _carries_task(row: dict[str, Any]) -> bool:
    return all(column in row for column in _TASK_COLUMNS)


def _joined(row: dict[str, Any], known: dict[str, Task], where: str) -> Generated:
    task_id = str(row["task_id"])
    if known and task_id in known:
        task = known[task_id]
    elif _carries_task(row):
        task = task_from_row(row, where)
    else:
        raise DataError("a task that the data set does not have", seen=f"{where}: {task_id}", fix="check --dataset")
    recorded = {key: value for key, value in row.items() if key not in ("generation", *_TASK_COLUMNS, "VQA")}
    return Generated(task, row["generation"], recorded)


def choose(found: Iterable[Generated], **filters: Any) -> list[Generated]:
    """Filter by task, as ``tasks.choose``."""
    pairs = list(found)
    kept = {task.id for task in task_module.choose([pair.task for pair in pairs], **filters)}
    return [pair for pair in pairs if pair.task.id in kept]


def row_for(task: Task, generation: str, **more: Any) -> dict[str, Any]:
    """A row in the official schema."""
    return {
        "task_id": task.id,
        "query": task.query,
        "feature_requirements": task.requirements,
        "task_name": task.name,
        "input_type": task.input_format,
        "output_type": task.output_format,
        "query_example": "",
        "VQA": [question._asdict() for question in task.questions],
        "raw_output_metric": list(task.rules),
        "rendering": task.rendered,
        "generation": generation,
        **more,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file that is being appended to; a cut last line is left out, a missing file is empty.

    Raises:
        DataError: a broken line that is not the last.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError("a line is not JSON", seen=f"{path}:{number}", fix="delete that line") from error
    return rows


def append(path: Path) -> IO[str]:
    """Open a JSON Lines file to append to; a line that a crash cut off is removed first, so that none is glued to it.

    Raises:
        UsageError: the path is a folder.
    """
    if path.is_dir():
        raise UsageError("that is a folder", seen=path, fix="name a file, e.g. out.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        raw = path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            whole = raw[: raw.rfind(b"\n") + 1]
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(whole)
            partial.replace(path)
    return path.open("a", encoding="utf-8")


def write_line(stream: IO[str], row: dict[str, Any]) -> None:
    """One row, on disk before the next is begun. Lone surrogates are written as escapes."""
    stream.write(json.dumps(row) + "\n")
    stream.flush()
