"""What `trimtab sft` trains on: loading, and errors that name the line.

Covered: local JSONL checked line by line, hub ids, TRL's mixtures; rows that teach nothing. Not covered: formats and
masking, which are TRL's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, UsageError


def load_data(script: Any, mixture: Any, evaluates: bool) -> Any:
    """The data set that the flags name; a local ``.jsonl`` or ``.json`` file is checked line by line first."""
    from datasets import DatasetDict, load_dataset
    from trl import get_dataset

    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError(
            "no data named", fix="pass --dataset_name FILE.jsonl (or a hub id), or `datasets:` in the YAML"
        )
    path = Path(script.dataset_name)
    if path.suffix in (".jsonl", ".json"):
        check_jsonl(path)
        found = DatasetDict(load_dataset("json", data_files={script.dataset_train_split: str(path)}))
        if evaluates and script.dataset_test_split not in found:
            fix = "use eval_strategy: no, or name both files under `datasets:` with test_split_size"
            raise UsageError("a single JSONL file has no evaluation split", seen=script.dataset_test_split, fix=fix)
        return found
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def check_jsonl(path: Path, flag: str = "--dataset_name") -> None:
    """Every line is an object in one of TRL's forms: ``messages``, ``prompt`` + ``completion``, or ``text``.

    Args:
        flag: the option that named the file, for the message.

    Raises:
        DataError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read the training data", seen=f"{path}: {error}", fix=f"check {flag}") from error
    if text.lstrip().startswith("["):
        return  # one JSON array: `datasets` reads it
    rows = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            seen, fix = f"{line[:120]} ({error})", "write one JSON object a line"
            raise DataError(f"malformed JSON in {path}, line {number}", seen=seen, fix=fix) from error
        _check_row(row, f"{path}, line {number}")
        rows += 1
    if rows == 0:
        raise DataError("the training data are empty", seen=path, fix="write one JSON object a line")


def read_rows(path: Path, flag: str) -> list[dict[str, Any]]:
    """The rows of a file in one of the forms of ``check_jsonl``: JSON Lines, or one JSON array of objects.

    Raises:
        DataError: naming file, and line or row.
    """
    check_jsonl(path, flag)
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    try:
        rows: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "write one JSON array of objects, or one JSON object a line"
        raise DataError("malformed JSON in the task rows", seen=f"{path}: {error}", fix=fix) from error
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{path}, row {number}")
    return rows


def _check_row(row: Any, where: str) -> None:
    if isinstance(row, dict) and ({"messages", "text", "input_ids"} & set(row) or {"prompt", "completion"} <= set(row)):
        return
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    fix = 'each row needs "messages", or "prompt" and "completion", or "text"'
    raise DataError(f"a row that cannot be trained on in {where}", seen=keys, fix=fix)


def require_supervised_tokens(trainer: Any, rows_given: int | None) -> None:
    """Raise when nothing is left to learn from: TRL drops rows whose labels are all masked or cut off.

    Raises:
        DataError: naming the likely cause.
    """
    dataset = trainer.train_dataset
    if rows_given is None or not hasattr(dataset, "__len__"):
        return  # a stream: its rows are not known yet
    if len(dataset) == 0:
        raise DataError(
            "no supervised token in any row: training would change nothing",
            seen=f"{rows_given} rows given, 0 left after tokenising",
            fix="raise --max_length, or check completion_only_loss / assistant_only_loss against the data's form",
        )
    if len(dataset) < rows_given and not trainer.args.packing:
        lost = rows_given - len(dataset)
        print(f"warning: {lost} of {rows_given} rows have no supervised token and were dropped", file=sys.stderr)
