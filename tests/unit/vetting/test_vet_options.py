"""Options that nothing would read are refused by name, by flag and in the file; answers too short for an axis too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.unit.vetting.small_models import random_model

from trimtab.approximation.activations import Polynomial
from trimtab.cli import trimtab as command_line
from trimtab.cli.vetting import NOT_SEARCHED, SEARCHED
from trimtab.errors import ApproximationError, UsageError
from trimtab.vetting import search, sweep

VALUES = {
    **{"approx": "a8", "axis": "compliance", "perplexity": "text.txt", "accuracy": "task.jsonl", "limit": "5"},
    **{"workers": "2", "before": "runs/vet", "policy": "policy.yaml", "title": "Mine", "redact": False},
    **{"search_prompts": "16", "seeds": "2"},
}


def run(*words: str) -> Any:
    return CliRunner().invoke(command_line, list(words))


def flags(key: str) -> list[str]:
    name = "--" + key.replace("_", "-")
    return ["--no-redact"] if key == "redact" else [name, VALUES[key]]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise UsageError("stop here")

    monkeypatch.setattr(search, "run_search", stop)
    monkeypatch.setattr(sweep, "sweep", stop)


@pytest.mark.parametrize("key", [*NOT_SEARCHED, *SEARCHED])
def test_what_a_search_or_a_vet_would_ignore_is_refused(key: str, tmp_path: Path, stopped: None) -> None:
    out, how = tmp_path / "out", [] if key in SEARCHED else ["--search"]
    result = run("vet", "demo", *how, "--out", str(out), *flags(key))
    assert isinstance(result.exception, UsageError)
    text = str(result.exception)
    assert f"nothing reads {flags(key)[0].replace('--no-redact', '--redact/--no-redact')} with" in text
    assert " ".join(flags(key)) in text and "leave that out" in text
    config = tmp_path / "vet.yaml"
    value = json.dumps(VALUES[key])
    config.write_text(f"model: demo\nout: {out}\nsearch: {str(bool(how)).lower()}\n{key}: {value}\n")
    text = str(run("vet", "--config", str(config)).exception)
    assert f"{config}: {key}:" in text and "nothing reads" in text
    assert not out.exists()


def test_all_that_is_ignored_is_named_at_once(tmp_path: Path, stopped: None) -> None:
    result = run("vet", "demo", "--search", "--limit", "5", "--approx", "a8", "--out", str(tmp_path))
    assert "nothing reads --approx, --limit with --search" in str(result.exception)


def test_what_both_read_and_what_nobody_gave_is_accepted(tmp_path: Path, stopped: None) -> None:
    words = ["vet", "demo", "--out", str(tmp_path), "--batch-size", "4", "--max-new-tokens", "5", "--json"]
    assert "stop here" in str(run(*words).exception)
    assert "stop here" in str(run(*words, "--search", *flags("seeds"), *flags("search_prompts")).exception)


@pytest.mark.parametrize(
    ("words", "flag", "when"),
    [
        ("--method quada --noise none --data rows.jsonl --pairs 8", "--pairs", "with --data"),
        ("--method quada --noise none --data rows.jsonl --one-sided", "--two-sided/--one-sided", "with --data"),
        ("--method quada --noise none --data rows.jsonl --two-sided", "--two-sided/--one-sided", "with --data"),
        *[
            (f"--method quada --noise none {option}", option.split()[0], "with --method quada")
            for option in ("--innocent-rows 2", "--texts 4", "--reply-tokens 4", "--clean 1", "--drift-bound 0.1")
        ],
        ("--method quada --noise none --fp32", "--bf16/--fp32", "with --method quada"),
        *[
            (option, option.split()[0], "with --method distill")
            for option in ("--data rows.jsonl", "--all-layers", "--cosine 0", "--imitation 1", "--beta 0.2")
        ],
        ("--one-sided", "--two-sided/--one-sided", "with --method distill"),
    ],
)
def test_what_a_method_of_hardening_would_ignore_is_refused(
    words: str, flag: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab import models

    monkeypatch.setattr(models, "load", lambda name: pytest.fail("a model was loaded"))
    result = run("harden", "demo", *words.split(), "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, UsageError)
    text = str(result.exception)
    assert f"nothing reads {flag} {when}" in text and words.split()[-1] in text and "leave that out" in text


def test_a_number_at_the_end_of_an_answer_needs_a_length(tmp_path: Path, stopped: None) -> None:
    questions = tmp_path / "sums.jsonl"
    questions.write_text(json.dumps({"prompt": "2 + 2?", "answer": "#### 4"}))
    for match in ("number", "gsm8k"):
        words = ["vet", "demo", "--axis", f"accuracy={questions}?match={match}", "--out", str(tmp_path / "out")]
        error = run(*words).exception
        assert isinstance(error, UsageError) and "cut off" in str(error) and "--max-new-tokens 256" in str(error)
        short = run(*words, "--max-new-tokens", "12")
        assert "stop here" in str(short.exception) and "cut off before their number" in short.stderr
        enough = run(*words, "--max-new-tokens", "64")
        assert "stop here" in str(enough.exception) and not enough.stderr
    plain = run("vet", "demo", "--axis", f"accuracy={questions}?match=exact", "--out", str(tmp_path / "out"))
    assert "stop here" in str(plain.exception) and not plain.stderr


def test_no_page_is_promised_where_nothing_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Polynomial, subject: object) -> None:
        raise ApproximationError("left its range in layer 1")

    model, out = random_model(tmp_path / "model"), tmp_path / "out"
    common = ["vet", model, "--axis", "compliance?limit=2", "--max-new-tokens", "2", "--workers", "1"]
    words = [*common, "--out", str(out), "--approx"]
    assert f"report: {out / 'report.html'}" in run(*words, "a8").stdout
    monkeypatch.setattr(Polynomial, "edits", fail)
    result = run(*words, "bolt")
    assert result.exit_code == 4
    assert f"report: {out / 'report.md'}; no page" in result.stdout and "report.html" not in result.stdout
    assert not (out / "report.html").exists(), "that of the call before is of another approximation"
