"""The page: self-contained, complete, redactable, fast with thousands of items."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from itertools import pairwise

import pytest
from report_samples import run, three

from trimtab.comparison import compare
from trimtab.errors import UsageError
from trimtab.reports import to_html
from trimtab.reports.charts import PALETTE, axis_chart, tradeoff_chart
from trimtab.reports.html import _DARK

COMPARISONS = three()
PAGE = to_html(COMPARISONS, title="Three models")


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_page_loads_nothing() -> None:
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?(?:https?:|//|data:|file:)""", PAGE)
    assert "@import" not in PAGE
    assert "url(" not in PAGE
    assert " style=" not in PAGE  # the policy would block it


@pytest.mark.parametrize(("tag", "number"), [("style", 1), ("script", 1)])
def test_the_policy_names_the_hashes_of_our_own_texts(tag: str, number: int) -> None:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    assert len(found) == number
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = PAGE.replace("&#39;", "'")
    assert f"{tag}-src {allowed};" in policy
    assert "default-src 'none'" in policy


def test_the_page_names_what_failed_and_how_it_was_measured() -> None:
    for text in ("rose from", "Not enough evidence", "Unmeasured", "Regression", "chat_template differs"):
        assert text in PAGE
    for axis in COMPARISONS[0].axes:
        assert axis.judge in PAGE
        assert axis.dataset in PAGE
    assert "Smallest difference that could be found" in PAGE


def test_headings_do_not_skip_a_level_and_tables_have_captions() -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", PAGE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert PAGE.count("<table") == PAGE.count("<caption")
    ids = re.findall(r'\sid="([^"]+)"', PAGE)
    assert len(ids) == len(set(ids))


def test_charts_carry_a_text_alternative_and_known_colours() -> None:
    chart = axis_chart(COMPARISONS, "compliance")
    assert chart is not None
    assert 'role="img" aria-label="Complies with harmful requests. Reference ' in chart
    both = tradeoff_chart(COMPARISONS)
    assert both is not None
    for svg in (chart, both):
        used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-fA-F]+|rgb[^"]*|[a-z]+)"', svg)) - {"none", "transparent"}
        assert used <= set(PALETTE.values())
        assert " id=" not in svg


@pytest.mark.parametrize("name", ["ink", "muted", "bad", "unsure", "good"])
def test_text_has_enough_contrast_in_both_themes(name: str) -> None:
    assert contrast(PALETTE[name], "#f6f7f9") >= 4.5
    assert contrast(_DARK[name], "#1a212b") >= 4.5


def test_charts_are_left_out_where_nothing_was_measured() -> None:
    lone = [compare(run("a", 1, {"compliance": 0.1}), run("b", 2, {"compliance": 0.1}))]
    assert tradeoff_chart(lone) is None
    assert "Safety against utility" not in to_html(lone, title="One axis")
    unmeasured = [compare(run("a", 1, {"compliance": 0.1}), run("b", 2, {"accuracy": 0.1}))]
    assert axis_chart(unmeasured, "compliance") is None
    assert "Unmeasured" in to_html(unmeasured, title="Nothing")


def test_redaction_leaves_no_prompt_or_answer() -> None:
    page = to_html(COMPARISONS, title="Hidden", redact=True)
    assert "Question " not in page
    assert "Answer " not in page
    assert "compliance-" in page
    assert "Prompts and answers are hidden" in page


def test_one_candidate_needs_no_candidate_cards() -> None:
    page = to_html(COMPARISONS[:1], title="One")
    assert 'class="candidates"' not in page
    assert "rose from" in page


def test_models_of_the_same_name_stay_apart_in_charts() -> None:
    first, second = COMPARISONS[:2]
    chart = axis_chart([first, first, second], "compliance")
    assert chart is not None
    assert "plain (2)" in chart


def test_three_thousand_items_are_quick() -> None:
    base = run("a", 1, {"compliance": 0.0}, 3000)
    many = [compare(base, run("b", 2, {"compliance": 1.0}, 3000))]
    start = time.perf_counter()
    page = to_html(many, title="Many")
    assert page.count('class="card item"') == 3000
    assert time.perf_counter() - start < 15.0


def test_no_comparison_is_refused() -> None:
    with pytest.raises(UsageError):
        to_html([], title="Nothing")
