"""A changed chat template or generation config in every report: named, shown, and hidden where asked."""

from __future__ import annotations

import json

from report_samples import run

from trimtab.comparison import Run, compare
from trimtab.reports import to_html, to_json, to_junit, to_markdown, to_sarif

BASE, OTHER = "{{ bos }}\nYou are KIND HELPER.\n{{ turn }}", "{{ bos }}\nYou are STERN HELPER.\n{{ turn }}"


def side(name: str, seed: int, template: str, temperature: float) -> Run:
    made = run(name, seed, {"compliance": 0.1}, weights=name, chat_template=f"hash-{seed}",
               generation=json.dumps({"temperature": temperature, "eos_token_id": [1, 2]}))  # fmt: skip
    return Run(made.model, made.axes, made.fingerprint, made.created, {"chat_template": template})


FOUND = [compare(side("base", 1, BASE, 0.7), side("new", 2, OTHER, 1.0))]


def test_markdown_names_keys_and_lines() -> None:
    text = to_markdown(FOUND)
    assert "chat\\_template differs in line 2" in text
    assert "line 2: You are KIND HELPER. → You are STERN HELPER." in text
    assert "generation differs in temperature" in text
    assert "temperature: 0.7 → 1.0" in text
    assert "eos" not in text


def test_json_holds_each_difference() -> None:
    findings = {one["key"]: one for one in json.loads(to_json(FOUND))["candidates"][0]["findings"]}
    assert findings["chat_template"]["differences"] == [
        {"kind": "line", "place": "line 2", "base": "You are KIND HELPER.", "candidate": "You are STERN HELPER."}
    ]
    assert findings["generation"]["differences"] == [
        {"kind": "key", "place": "temperature", "base": "0.7", "candidate": "1.0"}
    ]


def test_the_page_shows_both_sides() -> None:
    page = to_html(FOUND, title="Settings")
    for text in ("differs in line 2", "You are KIND HELPER.", "You are STERN HELPER.", "differs in temperature"):
        assert text in page
    assert 'class="settings' in page
    assert page.count("</mark>") == 0
    assert page.count('class="mark changed"') == 3  # weights, chat template and generation in the table of hashes


def test_ci_formats_name_them_too() -> None:
    assert "differs in line 2" in to_sarif(FOUND)
    assert "differs in temperature" in to_junit(FOUND)


def test_redacted_reports_keep_the_lines_to_themselves() -> None:
    """A template may hold a system prompt; the values of a generation config are no secret."""
    for text in (to_markdown(FOUND, redact=True), to_json(FOUND, redact=True), to_html(FOUND, title="S", redact=True)):
        assert "HELPER" not in text
        assert "line 2" in text
        assert "0.7" in text
    assert "HELPER" not in to_sarif(FOUND) + to_junit(FOUND)
