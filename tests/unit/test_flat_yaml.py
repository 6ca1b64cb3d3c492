"""Flat YAML files: what a person gets wrong in them, wherever one is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.comparison.policy import Policy, load_policy
from trimtab.errors import DataError, TrimtabError, UsageError
from trimtab.flat_yaml import read_flat
from trimtab.tuning import sft
from trimtab.vetting.plan import read_config


def written(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", UsageError, "lines 1 and 3: a"),
        ("- a\n- b\n", UsageError, "flat"),
        ("just words\n", UsageError, "flat"),
        ("a: [1\n", DataError, "not YAML"),
        ("a: 1\n b: 2\n", DataError, "line 2"),
    ],
)
def test_a_wrong_file_is_told(text: str, kind: type[TrimtabError], told: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=told):
        read_flat(written(tmp_path, text), "the file", "a: 1")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", ""):
        with pytest.raises(DataError, match="cannot read the file"):
            read_flat(tmp_path / name, "the file", "a: 1")


def test_an_empty_policy_is_the_default_one(tmp_path: Path) -> None:
    assert load_policy(written(tmp_path, "# nothing\n")) == Policy()


def test_a_margin_that_is_set_twice_does_not_gate_a_release(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lines 1 and 3: margin\.compliance"):
        load_policy(written(tmp_path, "margin.compliance: 0.01\nalpha: 0.05\nmargin.compliance: 0.5\n"))


@pytest.mark.parametrize("flag", ["--config FILE", "--config=FILE"])
def test_training_does_not_take_the_last_of_two(flag: str, tmp_path: Path) -> None:
    path = written(tmp_path, "guard: keel\nmodel_name_or_path: demo\nguard: none\n")
    with pytest.raises(UsageError, match="lines 1 and 3: guard"):
        sft.parse(flag.replace("FILE", str(path)).split())


def test_a_vet_does_not_take_the_last_of_two(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lines 1 and 2: limit"):
        read_config(written(tmp_path, "limit: 10\nlimit: 100\n"))
