"""Syntax checks of the five text formats: at least a dozen good and a dozen bad documents each, trivial to nasty."""

from __future__ import annotations

import pytest

from trimtab.structeval.textual import CHECKS, official

DEEP = 200
GOOD: dict[str, list[str]] = {
    "json": ['{"a":1}', "[1]", '[null]', '{"a":{"b":[]}}', '{"é":"ü"}', '{"a":"\\u00e9\\n\\""}', " \n{\"a\": 1}\n ",
             "[[[]]]",
             '{"":0}', '[1e400, -0.0, 1E+2]', '{"a":1,"a":2}', "[" * DEEP + "1" + "]" * DEEP, '["\\ud83d\\ude00"]',
             '{"a": "</script><!--"}'],
    "yaml": ["a: 1", "- 1\n- 2", "a:\n  b: [1, {c: d}]", "a: |\n  text\n  more", "a: >-\n  folded", "? key\n: value",
             "a: &x 1\nb: *x", "base: &b {x: 1}\nc:\n  <<: *b", "a: 'it''s'", "a: \"\\u00e9\"", "é: ü",
             "---\na: 1\n...",
             "a: 2024-01-01", "{a: 1, b: [2]}", "# only a comment first\na: ~"],
    "toml": ["a = 1", "[t]\nx = 'y'", "a.b.c = 1", "[[p]]\nn = 1\n[[p]]\nn = 2", "d = 2024-01-01T00:00:00Z",
             "a = [1, 'x']",
             "a = {b = 1}", 'a = """\nmulti"""', "a = 0x1F", "a = inf", "a = 1_000", "[a.'b.c']\nd = 1", '"é" = 1',
             "# c\na = true"],
    "xml": ["<a/>", "<a><b>1</b></a>", "<?xml version='1.0'?><a/>".replace("<a/>",
             "<a x='1'/>"), "<a>&amp;&lt;&#233;</a>",
            "<a><![CDATA[<b>]]></a>", "<a><!-- c --><b/></a>", "<x:a xmlns:x='u'>1</x:a>", "<é>ü</é>",
             "<a>t<b>u</b>v</a>",
            "\n<a>\n</a>\n".replace("\n</a>", "x</a>"), "<a><b/><b/></a>", "<a b='&quot;'/>",
            "<r>" + "<n>" * DEEP + "1" + "</n>" * DEEP + "</r>", "<?pi x?><a>1</a>"],
    "csv": ["a,b\n1,2", "a\n1", 'a,b\n"x,y",2', 'a,b\n"x\ny",2', 'a,b\n"x""y",2', "a,b\r\n1,2\r\n", "a,b\n,\n",
             "é,ü\n1,2",
            "a,b\n1,2\n\n3,4", 'a,b\n"",""', "a;b\n1;2", "a,b\n1,2\n", "a,b,c\n1,2,3\n4,5,6", '"a","b"\n"1","2"'],
}  # fmt: skip
BAD: dict[str, list[str]] = {
    "json": ["", "{", "{'a':1}", "[1,]", '{"a":1}}', "NaN", "[NaN]", "[Infinity]", "1", '"text"', "{}", "[]", "null",
             "Here is: {}", '{"a":"\n"}', "[" * 100_000, '{a:1}', '{"a":1} // c'],
    "yaml": ["", "just prose", "42", "a: b: c", "a: [1", "a: 'x", "a:\n\t- x", "- a\nb: c", "{}", "[]",
             "---\n---\n", "a: *missing",
             "!!python/object/apply:os.system [ls]", "%YAML", "a: \x00", "a: 1\n---\nb: 2", "[" * 50_000, "a: &a [*a]"],
    "toml": ["", "a", "a =", "a = 1 b = 2", "[a", "a = 1\na = 2", "[a]\n[a]", "a = 'x", "a = {b = 1,}", "a = 01",
             "= 1", "a = \n1",
             "a = [1", "# nothing", "a = tru"],
    "xml": ["", "text", "<a>", "<a></b>", "<a/><b/>", "<a x=1/>", "<a>&nope;</a>", "<a><b></a></b>", "<a", "<1/>",
             "<a>\x00</a>",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", "<a>1 < 2</a>", "<a x='1' x='2'/>",
            "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><a>&x;</a>"],
    "csv": ["", "prose only", "a,b", "a,b\n1", "a,b\n1,2,3", "a,a\n1,2", "a,\n1,2", 'a,b\n"x,2', 'a,b\n"x"y,2',
             "Sure, here:\na,b,c",
            "a,b\n1,2\n3", "\n\n", "a,b\n1,2\n\nHope this helps!"],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_dozen_of_each(name: str) -> None:
    assert len(GOOD[name]) >= 12
    assert len(BAD[name]) >= 12


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in GOOD.items() for text in texts])
def test_good_documents(name: str, text: str) -> None:
    found = CHECKS[name](text)
    assert found.ok, found.error
    assert found.value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_bad_documents(name: str, text: str) -> None:
    found = CHECKS[name](text)
    assert found.ok is False
    assert found.error
    assert "\n" not in found.error
    assert found.value is None


@pytest.mark.parametrize(
    ("name", "code", "good"),
    [
        ("json", "{}", False),
        ("json", "1", True),
        ("json", "NaN", True),
        ("yaml", "prose", True),
        ("yaml", "", False),
        ("toml", "", False),
        ("toml", "a = [1, 'x']", False),  # toml 0.10 refuses mixed arrays, TOML 1.0 allows them
        ("xml", "<a/>", True),
        ("xml", "x", False),
        ("csv", "", True),
        ("csv", "prose", True),
        ("json", '["\ud800"]', False),  # cannot be written as UTF-8
        ("yaml", "a:\r\n- 1", True),
    ],
)
def test_what_the_reference_counts_as_good(name: str, code: str, good: bool) -> None:
    assert official.parse(code, name).good is good


def test_the_references_csv_cells_above_the_field_limit_leave_the_keys_unread() -> None:
    found = official.parse("a\n" + "x" * 200_000, "csv")
    assert found.good
    assert not found.keys_readable
