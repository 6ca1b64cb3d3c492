"""Document, JSON and Markdown: complete, consistent, harmless."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from report_samples import SHARES, run, three

from trimtab.comparison import Comparison, compare
from trimtab.errors import UsageError
from trimtab.reports import SCHEMA, to_document, to_json, to_markdown
from trimtab.reports.text import clip, markdown_text, moment, short_name, visible
from trimtab.reports.wording import overall_headline, perplexity_text

COMPARISONS = three()


def test_document_holds_every_number_of_the_comparison() -> None:
    document = to_document(COMPARISONS)
    assert document["schema"] == SCHEMA
    assert (document["verdict"], document["exit_code"]) == ("regression", 3)
    assert [one["exit_code"] for one in document["candidates"]] == [one.exit_code for one in COMPARISONS]
    for shown, comparison in zip(document["candidates"], COMPARISONS, strict=True):
        for entry, axis in zip(shown["axes"], comparison.axes, strict=True):
            assert (entry["name"], entry["verdict"]) == (axis.name, axis.verdict)
            if axis.estimate is None:
                assert entry["estimate"] is None
            else:
                assert entry["estimate"]["difference_interval"] == list(axis.estimate.difference_interval)
                assert f"n\u00a0=\u00a0{axis.estimate.pairs}" in entry["summary"]


def test_items_are_the_union_of_changes_with_worse_ones_first() -> None:
    items = to_document(COMPARISONS)["items"]
    expected = {(axis.name, pair.id) for one in COMPARISONS for axis in one.axes for pair in axis.changed_items}
    assert {(item["axis"], item["id"]) for item in items} == expected
    assert all(len(item["candidates"]) == 3 for item in items)
    ranks = ["worse" not in {side["direction"] for side in item["candidates"] if side} for item in items]
    assert ranks == sorted(ranks)


def test_an_item_that_one_candidate_lacks_is_none_there() -> None:
    items = [item for item in to_document(COMPARISONS)["items"] if item["axis"] == "perplexity"]
    assert items == [] or all(item["candidates"][2] is None for item in items)


def test_json_is_strict_ascii_and_reads_back() -> None:
    text = to_json(COMPARISONS)
    assert text.isascii()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(to_document(COMPARISONS)))


def test_infinite_bounds_become_null() -> None:
    one = compare(run("a", 1, {"perplexity": 2.0}, 1), run("b", 2, {"perplexity": 2.0}, 1))
    estimate = to_document([one])["candidates"][0]["axes"][0]["estimate"]
    assert estimate["difference_interval"] == [None, None]
    assert "unbounded" in to_markdown([one])


@pytest.mark.parametrize("render", [to_document, to_json])
def test_redaction_leaves_no_prompt_or_answer(render: object) -> None:
    text = str(render(COMPARISONS, redact=True))  # type: ignore[operator]
    assert "Question " not in text
    assert "Answer " not in text
    assert "compliance-" in text


def test_markdown_says_what_failed_with_numbers() -> None:
    text = to_markdown(COMPARISONS)
    assert text.startswith("# plain regressed: “Complies with harmful requests” rose from ")
    assert "not measured" in text
    assert "chat\\_template differs" in text
    assert "refused → harmful" in text
    assert "Privacy" in text
    assert "Question " not in text


def test_the_headline_names_safety_before_a_larger_loss_of_utility() -> None:
    shares = {"compliance": 0.05, "over_refusal": 0.1, "accuracy": 0.9, "perplexity": 3.0}
    base = run("base", 0, shares, n=400)
    worse = {**shares, "compliance": 0.25, "perplexity": 6.0}  # 20 points against twenty times the perplexity
    found = [compare(base, run(name, 1, worse, n=400)) for name in ("one", "two")]
    assert all("perplexity" in {axis.name for axis in one.axes if axis.verdict == "regression"} for one in found)
    headline = overall_headline(found)
    assert "Complies with harmful requests" in headline and "Perplexity" not in headline


def test_a_headline_over_several_says_whose_figure_it_is() -> None:
    shares = {"compliance": 0.05, "over_refusal": 0.1, "accuracy": 0.9, "perplexity": 3.0}
    base = run("base", 0, shares, n=400)
    found = [compare(base, run(name, 1, {**shares, "compliance": to}, n=400)) for name, to in (("a", 0.2), ("b", 0.6))]
    assert "a and b regressed, b the most: “" in overall_headline(found)
    assert "the most" not in overall_headline([found[0], compare(base, run("c", 0, shares, n=400))])


@pytest.mark.parametrize(
    ("nats", "text"), [(3.564, "35.3"), (7.59, "1,980"), (9.219, "10,100"), (13.9, "1.09e+06"), (800.0, "inf")]
)
def test_perplexity_is_written_out(nats: float, text: str) -> None:
    assert perplexity_text(nats) == text


def test_a_pass_prints_what_could_have_been_missed() -> None:
    axes = [axis for one in COMPARISONS for axis in one.axes if axis.verdict == "pass"]
    assert axes
    assert to_markdown(COMPARISONS).count("Smallest difference that would have been found") >= len(axes)


def test_no_comparison_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one"):
        to_document([])


def test_different_bases_are_refused() -> None:
    other: Comparison = compare(run("other", 9, SHARES), run("b", 2, SHARES))
    with pytest.raises(UsageError, match="share their base"):
        to_markdown([COMPARISONS[0], other])


def test_unseen_characters_become_visible() -> None:
    assert visible("a\u202eb\x00c\u200bd\ud800e") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+200B⟩d⟨U+D800⟩e"
    assert visible("line\r\nnext\ttab") == "line\nnext\ttab"
    assert visible("क्‍ष") == "क्‍ष"  # the joiner belongs to the script


def test_a_moment_is_written_for_people_and_what_is_none_stays() -> None:
    assert moment("2026-03-07T09:05:59+00:00") == "7 March 2026, 09:05 UTC"
    assert moment("2026-03-07T01:05:00+02:00") == "6 March 2026, 23:05 UTC"
    assert moment("2026-03-07T09:05:00") == "7 March 2026, 09:05"
    assert moment("yesterday") == "yesterday"


def test_names_are_short() -> None:
    assert short_name("org/model") == "model"
    assert short_name("runs/a/") == "a"
    assert len(short_name("x" * 99)) == 24
    assert short_name("") == "(no name)"
    assert short_name("///") == "///"
    assert clip("abc", 3) == "abc"


def test_markdown_text_shows_and_does_nothing_else() -> None:
    hostile = "| a | [x](http://evil) <b> `c` **d**\n# e"
    shown = markdown_text(hostile)
    assert "\n" not in shown
    assert "\\|" in shown
    assert "\\[x\\](http\\://evil)" in shown
    assert "\\<b\\>" in shown


def test_a_hostile_name_stays_in_its_cell() -> None:
    one = COMPARISONS[0]
    named = replace(one, candidate=replace(one.candidate, model="a|b\n## Pass"))
    lines = to_markdown([named]).splitlines()
    assert not any(line.startswith("## Pass") for line in lines)


def test_several_unmeasured_axes_are_them() -> None:
    both = {"compliance": 0.1, "accuracy": 0.9}
    found = compare(run("a", 1, {**both, "perplexity": 2.0}), run("b", 2, {"compliance": 0.1}))
    assert "were not measured, so nothing can be concluded about them." in overall_headline([found])
    one = compare(run("a", 1, both), run("b", 2, {"compliance": 0.1}))
    assert "was not measured, so nothing can be concluded about it." in overall_headline([one])
