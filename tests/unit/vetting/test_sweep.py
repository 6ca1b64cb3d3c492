"""A whole sweep on a tiny model: records, resume, failures, report, exit code; configuration files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab.approximation import naming
from trimtab.cli import trimtab as command_line
from trimtab.errors import ApproximationError, DataError, TrimtabError, UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.vetting import plan, report, sweep

AXES = (AxisSpec("compliance", limit=4), AxisSpec("over_refusal", limit=4))


@pytest.fixture
def settings(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> sweep.VetSettings:
    tiny.model.config.max_position_embeddings = 512
    monkeypatch.setattr(sweep, "load", lambda name: tiny)
    return sweep.VetSettings("tiny", AXES, max_new_tokens=4)


def quiet(settings: sweep.VetSettings, names: list[str], out: Path):  # type: ignore[no-untyped-def]
    return sweep.sweep(settings, names, out, progress=False, tell=lambda line: None)


def test_a_sweep_records_resumes_and_reports(
    settings: sweep.VetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, vetted = quiet(settings, ["a8", "teal:0.5"], tmp_path)
    assert [one.name for one in vetted] == ["a8", "teal:0.5"]
    record = json.loads((tmp_path / "teal_0.5" / sweep.RECORD).read_text())
    assert record["label"] == "teal:share=0.5,prefill=0.5"
    pooled = {entry["site"]: entry for entry in record["errors"]["local"] if entry["layer"] == -1}
    assert pooled["up"]["std"] > 0 and pooled["up"]["shape"] in ("Gaussian", "Laplace")
    assert record["speed"]["cost"] > 0
    assert base.axes.keys() == vetted[0].run.axes.keys()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished sweep loaded the model again")

    monkeypatch.setattr(sweep, "load", never)
    again_base, again = quiet(settings, ["teal:0.5"], tmp_path)
    assert again[0].run == vetted[1].run and again_base == base

    found = report.make_report(base, vetted)
    header, body = report.table(found)
    assert header[:3] == ["approximation", "complies (n 4)", "refuses innocents (n 4)"]
    assert body[0][0] == "none" and {row[0] for row in body[1:]} == {"a8", "teal:0.5"}
    assert found.exit_code in (0, 3, 5)
    assert all(len(row) == len(header) for row in body)
    page = report.to_page(found, title="A <b>title</b>")
    assert "<b>title" not in page and page.count("vet-title") == 2 and "TEAL: in prefill" in page
    assert "approximation differs" not in page and "same weights" not in page  # a vet's own premise is no warning
    assert "teal:0.5" in report.to_markdown(found)
    assert all("approximation differs" in "".join(f.message for f in one.findings) for one in found.comparisons)
    json.dumps(report.to_document(found))


def test_the_worst_cases_say_how_much_of_them_is_answers_at_all() -> None:
    row = report.Row("a4", "regression", {}, 0.931, "7 of 58: 12 % [6, 23]", "", "", ("", "", ""), ())
    calm = replace(row, name="kv8", rise=0.0)
    unread = replace(row, name="a6", rise=0.1, sound="–")
    found = report.VetReport(None, (), (row, unread, calm), (), "regression")  # type: ignore[arg-type]
    said = "a4 (+93.1 points; real answers 7 of 58: 12 % [6, 23]), a6 (+10.0 points)."
    assert report.worst_lines(found) == [f"Largest rises in harmful compliance: {said}"]


@pytest.mark.parametrize(
    ("shape", "text"),
    [("Gaussian", "N(-0.003, 0.075²), 43.4% of σ"), ("Laplace", "Lap(0.06), mean -0.003, 43.4% of σ"), ("none", "0")],
)
def test_errors_are_shown_with_their_mean(shape: str, text: str) -> None:
    entry = {"shape": shape, "mean": -0.0031, "std": 0.0754, "laplace": 0.06, "relative": 0.4342}
    assert report.error_text(entry) == text


def test_a_technique_that_fails_is_unmeasured_and_the_sweep_goes_on(
    settings: sweep.VetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.approximation.activations import Polynomial

    def fail(self: Polynomial, subject: object) -> None:
        raise ApproximationError("left its range in layer 1", seen="values to 9e9")

    monkeypatch.setattr(Polynomial, "edits", fail)
    base, vetted = quiet(settings, ["bolt", "a8"], tmp_path)
    assert vetted[0].run is None and "layer 1" in vetted[0].failure and vetted[1].run is not None
    found = report.make_report(base, vetted)
    assert "could not be measured" in report.to_markdown(found) and "could not be measured" in report.to_page(
        found, title="t"
    )
    assert found.verdict in ("unmeasured", "regression")


def test_other_settings_and_approximated_names_are_refused(settings: sweep.VetSettings, tmp_path: Path) -> None:
    quiet(settings, ["a8"], tmp_path)
    with pytest.raises(UsageError, match="other settings"):
        quiet(sweep.VetSettings("tiny", AXES, max_new_tokens=5), ["a8"], tmp_path)
    older = tmp_path / "older"
    quiet(settings, ["a8"], older)
    held = json.loads((older / sweep.SETTINGS).read_text())
    held.pop("undecided_max_new_tokens")  # as a version wrote it that did not ask undecided answers again
    (older / sweep.SETTINGS).write_text(json.dumps(held))
    with pytest.raises(UsageError, match="undecided_max_new_tokens"):
        quiet(settings, ["a8", "kv8"], older)
    with pytest.raises(UsageError, match="exact model"):
        quiet(sweep.VetSettings("tiny?approx=a8", AXES), ["a8"], tmp_path / "other")
    (tmp_path / "a8" / sweep.RECORD).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        quiet(settings, ["a8"], tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("model: [demo", DataError, "not YAML"),
        ("- demo", UsageError, "flat"),
        ("model: demo\naprox: a8", UsageError, "did you mean approx?"),
        ("approx: 8", UsageError, "a name or a list of names"),
        ("model: demo\nlimit: 50\nlimit: 500", UsageError, "lines 2 and 3: limit"),
        ("{model: demo, limit: 50, model: mine}", UsageError, "lines 1 and 1: model"),
    ],
)
def test_a_bad_configuration_says_why(tmp_path: Path, text: str, error: type[TrimtabError], words: str) -> None:
    path = tmp_path / "vet.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        plan.read_config(path)
    assert words in str(caught.value)
    with pytest.raises(DataError, match="cannot read"):
        plan.read_config(tmp_path / "absent.yaml")


def test_the_command_reads_the_configuration_and_stops_before_loading(tmp_path: Path) -> None:
    path = tmp_path / "vet.yaml"
    path.write_text(f"model: demo\nout: {tmp_path / 'o'}\napprox: [tael:0.5]\n")
    result = CliRunner().invoke(command_line, ["vet", "--config", str(path)])
    assert isinstance(result.exception, UsageError) and "did you mean teal?" in str(result.exception)
    result = CliRunner().invoke(command_line, ["vet", "--config", str(path), "--approx", "teal:7"])
    assert "out of range" in str(result.exception)  # the flag overrides the file
    assert "vet needs out" in str(CliRunner().invoke(command_line, ["vet", "demo"]).exception)


def test_default_axes_have_a_text(tmp_path: Path) -> None:
    axes = plan.axes_for((), tmp_path)
    assert [axis.kind for axis in axes] == ["compliance", "over_refusal", "perplexity"]
    assert axes[2].prompts().prompts
    assert [axis.kind for axis in plan.axes_for(("compliance",), tmp_path)] == ["compliance"]
    assert len({naming.slug(name) for name in naming.ALL}) == len(naming.ALL)
