"""The key-path grammar, rule by rule, as the reference reads it."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.structeval import paths

CSV = {"csv_headers": ["name", "planet.mass"], "csv_rows": [{"name": "a", "planet.mass": "1"}]}


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ("a", ("a",)),
        ("a.b[0].c", ("a", "b", "[0]", "c")),
        ("a..b", ("a", "b")),
        (".a.", ("a",)),
        ("a[0][1]", ("a", "[0]", "[1]")),
        ("a.*.b", ("a", "*", "b")),
        ("a[*]", ("a", "[*]")),
        ("`a.b`.c", ("a.b", "c")),
        ("a`[0]`", ("a[0]",)),
        ("`a", ("a",)),
        ("a.@id", ("a", "@id")),
        ("csv::a.b[0]", ("csv::a.b[0]",)),
        ("x.csv::a", ("x", "csv::a")),
        ("", ()),
        ("a]", ("a]",)),
        ("a[b.c]", ("a", "[b.c]")),
    ],
)
def test_tokens(path: str, tokens: tuple[str, ...]) -> None:
    assert paths.tokens_of(path) == tokens


def test_an_unclosed_bracket_is_an_error_and_leads_nowhere() -> None:
    with pytest.raises(paths.PathSyntaxError, match=r"a\[0"):
        paths.tokens_of("a[0")
    assert not paths.exists({"a": [1]}, "a[0")
    assert not paths.can_match("a[0")


@pytest.mark.parametrize(
    ("document", "path", "found"),
    [
        ({"a": None}, "a", True),
        ({"a": ""}, "a", True),
        ({"a": {}}, "a.b", False),
        ({"a": [{"b": 1}, {"c": 2}]}, "a.*.c", True),
        ({"a": [{"b": 1}]}, "a.*.c", False),
        ({"a": {"b": 1}}, "a.*.b", False),
        ({"a": [1, 2]}, "a[1]", True),
        ({"a": [1, 2]}, "a[2]", False),
        ({"a": [1, 2]}, "a[-1]", False),
        ({"a": [1, 2]}, "a[*]", False),
        ({"a": [1, 2]}, "a[ 1 ]", True),
        ({"a": {"0": 1}}, "a[0]", False),
        ({"a": "xy"}, "a[0]", False),
        ({2024: 1}, "2024", False),
        ({"a": {"id": 1}}, "a.@id", True),
        ({"a": {"@id": {"x": 1}, "id": 1}}, "a.@id.x", True),
        ({"a": {"@id": 1, "id": {"x": 1}}}, "a.@id.x", False),
        ({"a": {"@id": 1}}, "a.id", False),
        ([1], "*", True),
        ([[1]], "[0][0]", True),
        ([1], "a", False),
        ({"a.b": 1}, "`a.b`", True),
        ({"a.b": 1}, "a.b", False),
        (CSV, "csv::name", True),
        (CSV, "csv::Name", False),
        (CSV, "csv::planet.mass", True),
        (CSV, "csv::name ", False),
        (CSV, "name", False),
        (CSV, "csv_rows[0].name", True),
        ({"csv::name": 1}, "csv::name", True),
        ({"csv_headers": None, "csv_rows": []}, "csv::name", False),
        ({}, "", True),
        (None, "a", False),
    ],
)
def test_walk(document: Any, path: str, found: bool) -> None:
    assert paths.exists(document, path) is found


def test_a_lone_xml_child_is_no_list() -> None:
    from trimtab.structeval.textual import check_xml

    document = check_xml("<a><b><c>1</c></b></a>").value
    assert paths.exists(document, "a.b.c")
    assert not paths.exists(document, "a.b[0].c")


def test_shares_and_impossible_rules() -> None:
    assert paths.share_found({"a": 1}, ("a", "b")) == 0.5
    assert paths.share_found({"a": 1}, ()) == 0.0
    assert paths.missing({"a": 1}, ("a", "b", "c")) == ("b", "c")
    assert [paths.can_match(path) for path in ("a[*]", "a[-1]", "a[0]", "a.*.b")] == [False, False, True, True]
