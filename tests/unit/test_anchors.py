"""Anchor files: good ones load, bad ones are named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.anchors import PUBLISHED_REPLY, Anchor, SafetyAnchors
from trimtab.errors import DataError


def test_published_is_the_paper_s_one_sample() -> None:
    anchors = SafetyAnchors.published()
    assert len(anchors.anchors) == 1 and anchors.anchors[0].reply == PUBLISHED_REPLY


def test_hash_changes_with_content_only() -> None:
    assert SafetyAnchors.bundled(4).sha256 == SafetyAnchors.bundled(4).sha256
    assert SafetyAnchors.bundled(4).sha256 != SafetyAnchors.bundled(5).sha256


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"request": "x y", "side": "refuse", "reply": "no"}) + "\n\n")
    assert SafetyAnchors.from_jsonl(path).anchors[0].reply == "no"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    anchors = SafetyAnchors(
        (
            Anchor("say \u201cno\u201d\n\u2028twice", "refuse", "no \u2014 I can't", "manners"),
            Anchor("hello", "answer"),
        ),
        "by hand",
    )
    anchors.to_jsonl(tmp_path / "a.jsonl")
    assert SafetyAnchors.from_jsonl(tmp_path / "a.jsonl").anchors == anchors.anchors
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"side": "refuse"}', "line 2"),
        ('{"request": "x", "side": "no"}', "line 2"),
        ('{"request": "x", "side": "refuse", "answer": "y"}', "unknown key"),
        ("[]", "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"request": "fine", "side": "answer"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        SafetyAnchors.from_jsonl(path)


def test_the_parser_s_reason_is_seen_and_the_fix_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{")
    with pytest.raises(DataError, match="Expecting property name") as caught:
        SafetyAnchors.from_jsonl(path)
    assert caught.value.fix == "write one JSON object a line"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        SafetyAnchors.from_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no anchors"):
        SafetyAnchors.from_jsonl(tmp_path / "empty.jsonl")


def test_more_anchors_than_there_are() -> None:
    with pytest.raises(DataError, match="1 to 168"):
        SafetyAnchors.bundled(1000)
