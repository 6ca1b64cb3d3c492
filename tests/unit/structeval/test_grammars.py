"""What a grammar accepts, parses: random walks under its masks, read by strict parsers; bad documents never pass."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tests.unit.structeval.test_constrained import byte_model
from tests.unit.structeval.test_structeval_textual import BAD

from trimtab.structeval import grammars
from trimtab.structeval.textual import CHECKS

llguidance = pytest.importorskip("llguidance", reason="pip install 'trimtab[structeval-constrained]'")

PROMPT = "Make a list of books with title, author and ISBN; the root is <library>."
SAYS = {
    "json": ['{"a": 1}', '{"books": [{"title": "x", "pages": [1, -2.5e3, null]}], "ok": true}', "[1, 2]"],
    "yaml": ["a: 1\n", "books:\n  - title: A tale, retold\n    pages: 12\n  - title: \"x: y\"\nkinds:\n  - one\n",
             "when: 2024-02-28\nurl: \"https://example.org/a\"\nempty: []\ncount: 3 apples\nneg: -2.5\n"],
    "toml": ['a = 1', '[book]\ntitle = "x"\npages = [1, 2]\n\n[[book.author]]\nname.first = "y"\nok = true\n',
             "d = 2024-02-28\nt = { a = 1, b = [] }".replace("{ ", "{").replace(" }", "}")],
    "xml": ["<library/>", '<?xml version="1.0" encoding="UTF-8"?>\n<library><title ISBN="1">a &lt; b</title></library>',
            "<library>\n  <author>x</author>\n</library>\n"],
    "csv": ["a\n1", "a,b\n1,2\n", 'name,text\nx,"a, b"\ny,"say ""hi"""\n', "a,b,c\n,,\n"],
}  # fmt: skip
OUTSIDE = {"toml": ("a = 1\na = 2", "[a]\n[a]"), "csv": ("a,a\n1,2",)}  # what no context-free grammar can refuse


@pytest.fixture(scope="module")
def tools() -> Any:
    import llguidance.hf

    loaded = byte_model()
    return loaded.tokenizer, llguidance.hf.from_tokenizer(loaded.tokenizer, n_vocab=len(loaded.tokenizer), eos_token=2)


def accepts(tools: Any, name: str, text: str) -> bool:
    tokenizer, guide = tools
    matcher = llguidance.LLMatcher(guide, llguidance.LLMatcher.grammar_from_lark(grammars.grammar(name, PROMPT)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(matcher.validate_tokens(ids) == len(ids) and (not ids or matcher.consume_tokens(ids))
                and matcher.is_accepting())  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in SAYS.items() for text in texts])
def test_ordinary_documents_can_be_written(tools: Any, name: str, text: str) -> None:
    assert CHECKS[name](text).ok, text  # the test's own document is good
    assert accepts(tools, name, text)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_bad_documents_cannot(tools: Any, name: str, text: str) -> None:
    if text in OUTSIDE.get(name, ()) or len(text) > 10_000:
        return
    assert not accepts(tools, name, text)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_whatever_is_written_under_the_masks_parses(tools: Any, name: str) -> None:
    """400 walks: marks of the format, letters, or any byte, each allowed one as likely as the next."""
    import llguidance.numpy
    import numpy as np

    tokenizer, guide = tools
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    marks = {place for place, word in enumerate(words) if word in '<>/="[]{}:,-&;\u0120\u010a'}
    closers = [words.index(mark) for mark in {"json": '"]}', "toml": '"]}', "xml": '<"/>'}.get(name, '"')]
    letters = {place for place, word in enumerate(words) if word.isascii() and word.isalnum()}
    rules = llguidance.LLMatcher.grammar_from_lark(grammars.grammar(name, PROMPT))
    mask, draw, ended, longest = llguidance.numpy.allocate_token_bitmask(1, len(words)), random.Random(0), 0, 0
    for _ in range(400):
        matcher, written = llguidance.LLMatcher(guide, rules), []
        while not matcher.is_stopped() and len(written) < 300:
            llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
            allowed = set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(words)])[0].tolist())
            assert allowed, tokenizer.decode(written)  # never a dead end
            if 2 in allowed and (draw.random() < 0.15 or len(written) > 80):
                matcher.consume_token(2)
                break
            if len(written) > 50:  # come to an end: the first closing mark that is allowed
                allowed = set([mark for mark in closers if mark in allowed][:1]) or allowed
            pools = [pool for pool in (allowed & marks, allowed & letters, allowed - {2}) if pool] or [{2}]
            chosen = draw.choice(sorted(draw.choice(pools)))
            written.append(chosen)
            matcher.consume_token(chosen)
        text = tokenizer.decode(written)
        if len(written) == 300 or "\ufffd" in text:  # cut, or half a character: bytes, no text
            continue
        found = CHECKS[name](text)
        allowed_errors = ("overwrite", "declare", "twice")  # what is given twice: OUTSIDE
        assert found.ok or any(word in found.error for word in allowed_errors), (text, found)
        ended, longest = ended + 1, max(longest, len(text))
    assert ended > 100 and longest > 50


def test_xml_names_are_the_words_of_the_task() -> None:
    assert grammars.names_in("The tags: book-list, a.b. xmlns; 9 lives") == ("The", "tags", "book-list", "a.b", "lives")
    assert grammars.names_in("") == grammars.FALLBACK_NAMES
    assert len(grammars.names_in(" ".join(f"n{n}" for n in range(1000)))) == grammars.MOST_NAMES


def test_vega_is_json() -> None:
    assert grammars.grammar("vega", "") == grammars.grammar("json", "")
    assert json.loads(grammars.grammar("json", "").removeprefix("start: %json "))
    assert grammars.unconstrained(["json", "svg", "csv", "svg"]) == ["svg"]
