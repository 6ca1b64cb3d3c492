"""A configuration with the wrong kind of value is told by key, value and what is expected; through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from trimtab.cli import trimtab as command_line
from trimtab.errors import UsageError
from trimtab.vetting import search


def vet(tmp_path: Path, text: str, *flags: str) -> Any:
    path = tmp_path / "vet.yaml"
    path.write_text(text)
    return CliRunner().invoke(command_line, ["vet", "--config", str(path), *flags])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model: [demo]", "one word or line of text"),
        ("model: {a: 1}", "one word or line of text"),
        ("model: 8", "one word or line of text"),
        ("perplexity: [a.txt]", "one path"),
        ("accuracy: {a: b}", "one path"),
        ("out: [x]", "one path"),
        ("policy: 3", "one path"),
        ("title: [a, b]", "one word or line of text"),
        ("workers: {a: 1}", "a whole number of at least 1"),
        ("workers: 0", "a whole number of at least 1"),
        ("limit: 2.5", "a whole number of at least 1"),
        ("limit: true", "a whole number of at least 1"),
        ("max_new_tokens: many", "a whole number of at least 1"),
        ("batch_size: [8]", "a whole number of at least 1"),
        ("search_prompts: 4", "a whole number of at least 8"),
        ("seeds: -1", "a whole number of at least 1"),
        ("redact: maybe", "true or false"),
        ("search: [true]", "true or false"),
        ("approx: 8", "a name or a list of names"),
        ("approx: [a8, 4]", "a name or a list of names"),
        ("axis: {compliance: 1}", "a name or a list of names"),
    ],
)
def test_the_wrong_kind_of_value_names_key_value_and_what_is_expected(tmp_path: Path, line: str, expected: str) -> None:
    key = line.partition(":")[0]
    rest = {"model": "demo", "out": str(tmp_path / "o")}
    result = vet(tmp_path, yaml.safe_dump({name: value for name, value in rest.items() if name != key}) + line)
    assert isinstance(result.exception, UsageError), result.exception
    text = str(result.exception)
    value = yaml.safe_load(line)[key]
    assert key in text and repr(value) in text and expected in text
    assert not (tmp_path / "o").exists()


def test_right_values_reach_the_command_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(model: str, out: Path, **options: Any) -> None:
        seen.update(options, model=model, out=out)
        raise UsageError("stop")

    monkeypatch.setattr(search, "run_search", stop)
    text = f"model: demo\nout: {tmp_path}\nsearch: true\nseeds: '2'\nbatch_size: 4\nmax_new_tokens: 7\nlimit:\n"
    assert "stop" in str(vet(tmp_path, text, "--batch-size", "5").exception)
    assert (seen["model"], seen["out"]) == ("demo", tmp_path)
    assert (seen["seeds"], seen["batch_size"], seen["max_new_tokens"]) == (2, 5, 7)


def test_a_bad_value_that_a_flag_replaces_is_not_used(tmp_path: Path) -> None:
    result = vet(tmp_path, f"model: demo\nout: {tmp_path}\nworkers: [2]\napprox: tael\n", "--workers", "1")
    assert isinstance(result.exception, UsageError) and "did you mean teal?" in str(result.exception)
