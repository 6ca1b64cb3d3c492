from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.evaluation.files import read_rows, read_text
from trimtab.evaluation.windows import cut, text_windows


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_each_kind_of_file(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "a.csv", "p,c\nhello,x\n")) == [{"p": "hello", "c": "x"}]
    assert read_rows(write(tmp_path, "a.tsv", "p\tc\nhello\tx\n")) == [{"p": "hello", "c": "x"}]
    assert read_rows(write(tmp_path, "a.jsonl", '{"p": "hello"}\n\n{"p": "you"}\n')) == [{"p": "hello"}, {"p": "you"}]
    assert read_rows(write(tmp_path, "a.json", '[{"p": 1}]')) == [{"p": 1}]
    assert read_rows(write(tmp_path, "a.txt", "one\n\n two \n")) == [{"prompt": "one"}, {"prompt": "two"}]
    assert read_rows(write(tmp_path, "bom.csv", "\ufeffp\nhello\n")) == [{"p": "hello"}]


def test_a_unicode_line_separator_does_not_split_json_lines(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "a.jsonl", '{"p": "a\u2028b"}\n')) == [{"p": "a\u2028b"}]


def test_folder_reads_every_file_and_remembers_which(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", '{"p": 1}')
    write(tmp_path, "a.csv", "p\n2\n")
    write(tmp_path, "LICENSE", "text")
    assert [row["_file"] for row in read_rows(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "line 2"),
        ("x.jsonl", "[1, 2]\n", "line 1"),
        ("x.json", '{"a": 1}', "list of objects"),
        ("x.json", "[", "line 1"),
        ("x.csv", "a,b\n1,2,3\n", "line 2"),
        ("x.csv", "", "empty"),
        ("x.txt", "\n\n", "empty"),
        ("x.bin", "abc", "unknown kind"),
        ("x.txt", b"\xff\xfe\x00bad", "UTF-8"),
    ],
)
def test_malformed_files_say_where(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_rows(write(tmp_path, name, content))


def test_missing_file_and_folder_as_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(DataError, match="folder"):
        read_text(tmp_path)


def test_windows_cover_the_text_without_overlap(tmp_path: Path) -> None:
    text = "".join(f"line {number} of the text\n" for number in range(100)) + "x" * 500
    pieces = cut(text, 100)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    windows = text_windows(write(tmp_path, "t.txt", text), window_chars=100)
    assert [prompt.text for prompt in windows.prompts] == pieces


def test_windows_of_an_empty_text_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        text_windows(write(tmp_path, "t.txt", " \n \n"))


@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\x0b", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path: Path, odd: str) -> None:
    """Characters at which Python's splitlines breaks occur in real sets (MMLU) inside a field."""
    table = tmp_path / "q.csv"
    table.write_text(f'prompt,answer\r\nBake{odd}a cake,yes\n"two\nlines{odd}",no\n', encoding="utf-8", newline="")
    assert read_rows(table) == [
        {"prompt": f"Bake{odd}a cake", "answer": "yes"}, {"prompt": f"two\nlines{odd}", "answer": "no"}
    ]  # fmt: skip
    plain = tmp_path / "q.txt"
    plain.write_text(f"Bake{odd}a cake\nBoil an egg\n", encoding="utf-8")
    assert [row["prompt"] for row in read_rows(plain)] == [f"Bake{odd}a cake", "Boil an egg"]
