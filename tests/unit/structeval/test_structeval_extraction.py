"""Extraction: the reference's by an oracle of regular expressions, the fair one by cases."""

from __future__ import annotations

import codecs
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.structeval import extraction

_TAGS = r"<\|BEGIN_CODE\|\>[ \t]*\n?(?P<p1>.*?)(?:<\|END_CODE\|\>|$)"


def oracle(text: str, kind: str) -> str | None:
    """The specification's regular expressions, one pass after the other; None where the reference raises."""
    try:
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("<think>\n\n</think>\n\n", "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = codecs.decode(text, "unicode_escape")
    except ValueError:
        pass
    fence = rf"```(?:{re.escape(kind)}|[^\n]*)[ \t]*\n(?P<p2>.*?)(?:```|$)"
    found = re.search(f"(?:{_TAGS})|(?:{fence})", text, re.DOTALL | re.IGNORECASE)
    if found:
        payload = found["p1"] or found["p2"]
        if payload is None:
            return None
        code = payload.strip()
    else:
        code = text.strip()
    second = re.search(fence, text, re.DOTALL | re.IGNORECASE)
    return second["p2"].strip() if second else code


PIECES = st.sampled_from(
    ["<|BEGIN_CODE|>", "<|begin_code|>", "<|END_CODE|>", "```", "````", "```json", "\n", " ", "\t", "{", "a", "\\n",
     "\\",
     "\\u0041", "\\x", "&lt;", "<think>\n\n</think>\n\n", "é", "json", "\r"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=14).map("".join))
@settings(max_examples=400, deadline=None)
def test_official_extraction_is_the_specifications_regular_expressions(text: str) -> None:
    assert extraction.official(text).text == oracle(text, "json")


@pytest.mark.parametrize(
    ("generation", "official", "strict"),
    [
        ("<|BEGIN_CODE|>\n{}\n<|END_CODE|>", "{}", "{}"),
        ("<|BEGIN_CODE|>{}", "{}", "{}"),
        ("```json\n{}\n```", "{}", "{}"),
        ("```json\n{}", "{}", "{}"),
        ("hello", "hello", "hello"),
        ("<|BEGIN_CODE|>a<|END_CODE|>\n```\nb\n```", "b", "a"),
        ("<|BEGIN_CODE|>```json\n{}\n```<|END_CODE|>", "{}", "{}"),
        ("<|BEGIN_CODE|><|END_CODE|>", None, ""),
        ("<think>\n\n</think>\n\n[]", "[]", "[]"),
        ("<think>hm</think>[]", "<think>hm</think>[]", "[]"),
        ("<think>never ends []", "<think>never ends []", ""),
        ('{"a": "é"}', '{"a": "Ã©"}', '{"a": "é"}'),
        ('{"a": "x\\n"}', '{"a": "x\n"}', '{"a": "x\\n"}'),
        ("<a>1 &lt; 2</a>", "<a>1 < 2</a>", "<a>1 &lt; 2</a>"),
        ("", "", ""),
    ],
)
def test_extraction_cases(generation: str, official: str | None, strict: str) -> None:
    assert extraction.official(generation).text == official
    assert extraction.strict(generation).text == strict


def test_decoding_as_a_fallback_keeps_other_characters() -> None:
    assert extraction.decoded('{\\"a\\": \\"é\\"}') == '{"a": "é"}'
    assert extraction.decoded("no escapes") is None
    assert extraction.decoded("\\ud800") is None  # a lone surrogate is no text
    assert extraction.decoded("\\x") is None


@pytest.mark.parametrize(
    ("generation", "kind", "text"),
    [
        ("<|BEGIN_CODE|><b>x</b><|END_CODE|>", "html", "<b>x</b>"),
        ("<html>x</html>", "html", "<html>x</html>"),
        ("just words", "html", None),
        ("<|BEGIN_CODE|>\\frac{a}{b}<|END_CODE|>", "latex", "\\frac{a}{b}"),
        ("<|BEGIN_CODE|>a\x07b<|END_CODE|>", "tikz", "ab"),
        ("<|BEGIN_CODE|>a\\qb\\x<|END_CODE|>", "svg", "a\\qb\\x"),
        ("<|BEGIN_CODE|>a<|END_CODE|>```\nb\n```", "svg", "a"),
    ],
)
def test_extraction_of_formats_that_render(generation: str, kind: str, text: str | None) -> None:
    assert extraction.official_renderable(generation, kind).text == text


def test_hostile_text_takes_linear_time() -> None:
    began = time.process_time()
    for text in ("```" * 300_000, "<|BEGIN_CODE|>" * 50_000, "`" * 1_000_000, "<think>" * 100_000, "``` " * 200_000):
        extraction.official(text)
        extraction.strict(text)
    assert time.process_time() - began < 8
