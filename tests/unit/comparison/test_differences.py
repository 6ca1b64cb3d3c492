"""Which keys and lines of a setting changed, against difflib's own account and by hand."""

from __future__ import annotations

import difflib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.comparison import Axis, Item, Run, compare
from trimtab.comparison.differences import (
    MOST_LINES,
    Difference,
    differences,
    key_differences,
    line_differences,
    places,
)

ITEMS = tuple(Item(f"i{place}", "", f"prompt {place}", "answer", "refused", 0.0) for place in range(4))
AXIS = Axis("compliance", "Complies", "binary", True, "rules@1", "set", ITEMS)
TEMPLATE = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n"


def run(template: str | None, **prints: str) -> Run:
    texts = {} if template is None else {"chat_template": template}
    return Run("m", {"compliance": AXIS}, {"weights": "w", **prints}, "", texts)


def test_keys_that_changed_came_or_went() -> None:
    base = {"temperature": 0.7, "eos_token_id": [1, 2], "top_k": 50, "nested": {"a": 1, "b": None}}
    other = {"temperature": 1.0, "eos_token_id": [1, 2], "nested": {"a": 1, "b": False}, "top_p": 0.9}
    assert key_differences(base, other) == (
        Difference("key", "nested.b", "null", "false"),
        Difference("key", "temperature", "0.7", "1.0"),
        Difference("key", "top_k", "50", None),
        Difference("key", "top_p", None, "0.9"),
    )


def test_lines_that_changed_came_or_went() -> None:
    assert line_differences("a\nb\nc\nd", "a\nB\nc\nd\ne") == (
        Difference("line", "line 2", "b", "B"),
        Difference("line", "line 5", None, "e"),
    )
    assert line_differences("a\nb\nc", "a\nc") == (Difference("line", "line 2", "b", None),)


def test_a_template_on_one_long_line_is_read_tag_by_tag() -> None:
    start = "{% for message in messages %}" + "{{ '<|im_start|>' + message['role'] }}" * 4
    base, other = (start + tail + "{{ '<|im_end|>' }}{% endfor %}" for tail in ("{{ x }}", "{{ x | trim }}"))
    assert len(base) > 160
    assert line_differences(base, other) == (Difference("line", "line 1", "{{ x }}", "{{ x | trim }}"),)


@given(st.lists(st.text("ab \n", max_size=4), max_size=12), st.lists(st.text("ab \n", max_size=4), max_size=12))
def test_applying_what_differs_gives_the_other_text(ours: list[str], theirs: list[str]) -> None:
    """Oracle: difflib.ndiff names the same lines as taken out and put in."""
    base, other = "\n".join(ours), "\n".join(theirs)
    found = line_differences(base, other)
    assert (found == ()) == (base.splitlines() == other.splitlines())
    gone = [one.base for one in found if one.base is not None]
    new = [one.candidate for one in found if one.candidate is not None]
    before, after = base.splitlines(), other.splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    assert len(gone) == len(before) - kept
    assert len(new) == len(after) - kept
    assert all(line in before for line in gone)
    assert all(line in after for line in new)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers() | st.booleans() | st.none(), max_size=5))
def test_a_document_does_not_differ_from_itself(document: dict[str, object]) -> None:
    assert differences(json.dumps(document), json.dumps(document, indent=3)) == ()


def test_a_hostile_template_is_cut() -> None:
    base, other = ("\n".join(f"{side}{number}" for number in range(20_000)) for side in "ab")
    assert len(line_differences(base, other)) == MOST_LINES
    assert differences("[" * 100_000, "{}") != ()  # nested too deep to be JSON: read as text


def test_a_changed_generation_config_names_its_keys() -> None:
    base, other = (json.dumps({"temperature": value, "eos_token_id": 2}) for value in (0.7, 1.0))
    (finding,) = compare(run(TEMPLATE, generation=base), run(TEMPLATE, generation=other)).findings[:1]
    assert finding.kind == "differs"
    assert finding.message.startswith("generation differs in temperature: ")
    assert finding.differences == (Difference("key", "temperature", "0.7", "1.0"),)


def test_a_changed_chat_template_names_its_lines() -> None:
    other = TEMPLATE.replace(": ", "| ").replace("{% endfor %}", "{% endfor %}\n{# more #}")
    found = compare(run(TEMPLATE, chat_template="aa"), run(other, chat_template="bb")).findings
    finding = next(one for one in found if one.key == "chat_template")
    assert finding.message.startswith("chat_template differs in line 2 and line 4: ")
    assert finding.differences[0] == Difference(
        "line", "line 2", "{{ m.role }}: {{ m.content }}", "{{ m.role }}| {{ m.content }}"
    )
    assert (finding.base, finding.candidate) == ("aa", "bb")


@pytest.mark.parametrize("texts", [(None, None), (TEMPLATE, None), (None, TEMPLATE)])
def test_runs_that_kept_no_template_still_say_that_it_differs(texts: tuple[str | None, str | None]) -> None:
    found = compare(run(texts[0], chat_template="aa"), run(texts[1], chat_template="bb")).findings
    finding = next(one for one in found if one.key == "chat_template")
    assert finding.message.startswith("chat_template differs: ")
    assert finding.differences == ()


def test_the_same_settings_are_no_finding() -> None:
    same = compare(
        run(TEMPLATE, chat_template="aa", generation="{}"), run(TEMPLATE, chat_template="aa", generation="{}")
    )
    assert [one.key for one in same.findings] == ["weights"]


def test_many_places_are_summed_up() -> None:
    rows = tuple(Difference("line", f"line {number}", "a", "b") for number in range(1, 10))
    assert places(rows) == "line 1, line 2, line 3, line 4, line 5, line 6 and 3 more"
    assert places(rows[:1]) == "line 1"
