"""The command line: fast help, messages instead of stack traces, exit codes, one JSON document."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab import cli, doctor
from trimtab.evaluation import batching
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation

VERBS = sorted(cli.trimtab.commands)


class Outcome(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run a command in this process through ``main``; an exception that ``main`` lets through fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from trimtab.cli import trimtab; trimtab.main(['--help'], standalone_mode=False); "
    heavy = "('torch', 'transformers', 'numpy', 'scipy', 'inspect_ai', 'yaml', 'jinja2', 'datasets')"
    code += f"print('HEAVY', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_is_fast() -> None:
    """User time of the child, not wall time: the machine may be busy. The best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "trimtab", "--help"], capture_output=True, check=True)
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(times) < 0.3, times


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_and_exit_codes(verb: str, invoke: Invoke) -> None:
    done = invoke(verb, "--help")
    assert done.code == 0
    assert f"Examples:\n    trimtab {verb}" in done.out
    words = " ".join(done.out.split())
    codes = words.partition("Exit codes: ")[2].rstrip(".")
    assert {"1 usage", "2 could not run"} <= set(codes.split(", "))
    if verb in ("compare", "vet"):
        assert codes == "0 pass, 1 usage, 2 could not run, 3 regression, 4 an axis unmeasured, 5 not enough evidence"
    else:
        assert codes.startswith("0 ") and "regression" not in codes


def test_help_lists_every_verb(invoke: Invoke) -> None:
    done = invoke("--help")
    assert done.code == 0
    assert all(f"\n  {verb} " in done.out for verb in VERBS)
    verbs = "compare convert demo doctor eval geometry harden judge patch plan sft structeval vet"
    assert verbs.split() == VERBS


def test_version(invoke: Invoke) -> None:
    from trimtab import __version__

    assert invoke("--version") == (0, f"trimtab, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("frobnicate", "frobnicate"),
        ("--nope", "--nope"),
        ("eval demo --out x --nope", "--nope"),
        ("demo --nope", "--nope"),
        ("compare a b --nope", "--nope"),
        ("convert a b --nope", "--nope"),
        ("doctor --nope", "--nope"),
        ("eval demo", "--out"),
        ("eval --out x", "MODEL"),
        ("compare a", "CANDIDATES"),
        ("convert a", "TARGET"),
        ("eval demo --out x --limit 0", "--limit"),
        ("eval demo --out x --limit many", "many"),
        ("demo --seed x", "--seed"),
        ("demo --guard nonsense", "nonsense"),
        ("demo --workers 0", "--workers"),
        ("geometry ./nowhere --out x --lr -1", "--lr"),
        ("eval ./nowhere --out x --axis jailbreak:crescendo", "--attacker"),
        ("plan --margin -1", "margin"),
        ("plan --rate 7", "rate"),
        ("plan --flips -0.1", "flips"),
        ("eval ./nowhere --out x --judge gtp", "gtp"),
        ("eval demo --out x --axis safty", "safty"),
        ("eval demo --out x --axis accuracy:gsm8k", "gsm8k"),
        ("sft --gaurd keel", "--guard"),
        ("sft --guard kiel --model_name_or_path demo", "kiel"),
        ("sft --config nowhere.yaml", "nowhere.yaml"),
        ("sft", "--model_name_or_path"),
    ],
)
def test_wrong_usage_is_exit_code_1_and_named(
    line: str, named: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*line.split())
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("trimtab: ") and named in done.err and "fix:" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("compare absent also-absent", "absent"),
        ("compare empty empty", "trimtab eval"),
        ("compare empty empty --policy absent.yaml", "absent.yaml"),
        ("eval ./nowhere --out x", "./nowhere"),
        ("eval empty --out x", "empty"),
        ("eval nowhere.gguf --out x", "nowhere.gguf"),
        ("eval demo --out x --axis compliance=absent.jsonl", "absent.jsonl"),
        ("eval demo --out x --axis compliance=blank.jsonl", "empty"),
        ("convert ./nowhere out", "./nowhere"),
        ("geometry ./nowhere --out x --data absent.jsonl", "check --data"),
        ("geometry ./nowhere --out x --anchors absent.jsonl", "anchor file"),
        ("sft --model_name_or_path demo --dataset_name absent.jsonl", "absent.jsonl"),
        ("sft --model_name_or_path demo --dataset_name bad.jsonl", "line 2"),
        ("sft --model_name_or_path demo --dataset_name bad.jsonl --guard_anchors absent.jsonl", "anchor file"),
    ],
)
def test_what_cannot_be_used_is_exit_code_2_and_named(
    line: str, named: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": bad}\n')
    done = invoke(*line.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("trimtab: ") and named in done.err
    assert "Traceback" not in done.err


def test_a_missing_run_says_how_to_fix_it(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("compare", tmp_path / "base", tmp_path / "new", "--json")
    assert (done.code, done.out) == (2, "")
    assert "fix:" in done.err and "trimtab eval" in done.err


def test_a_full_target_is_not_overwritten(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("convert", "demo", tmp_path)
    assert done.code == 1 and str(tmp_path) in done.err


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EEXIST, "name another path"),
        (errno.EISDIR, "name a file"),
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "permissions"),
        (None, "check the path"),
    ],
)
def test_what_the_system_refuses_is_told_with_advice_that_fits(
    number: int | None, advice: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, "refused", "there") if number else OSError("refused")

    monkeypatch.setattr("trimtab.cli.trimtab.main", refuse)
    done = invoke("doctor")
    assert done.code == 2 and advice in done.err and "refused" in done.err


def test_a_page_that_cannot_be_written_is_no_stack_trace(runs: Path, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke("compare", runs / "refuses", runs / "refuses", "--html", tmp_path / "file" / "page.html")
    assert done.code == 2 and "fix:" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, EOFError])
def test_an_interruption_is_said_in_one_line(
    interruption: type[BaseException], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> list[doctor.Check]:
        raise interruption

    monkeypatch.setattr(doctor, "examine", interrupted)
    done = invoke("doctor")
    assert done.code == 130
    assert done.out == ""
    assert "trimtab: interrupted" in done.err and "Traceback" not in done.err


def test_doctor_prints_exactly_one_document(invoke: Invoke) -> None:
    done = invoke("doctor", "--json")
    assert done.code == 0
    checks = json.loads(done.out)["checks"]
    assert {"python", "torch", "memory", "disk", "demo model", "trl"} <= {check["name"] for check in checks}
    assert all(set(check) == {"name", "ok", "found", "fix"} for check in checks)


def test_doctor_for_a_person(invoke: Invoke) -> None:
    done = invoke("doctor")
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert all(line.startswith(("ok  ", "FAIL", "-   ")) for line in lines)


def test_convert_prints_exactly_one_document(invoke: Invoke, tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.save_pretrained(tmp_path / "m")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    done = invoke("convert", tmp_path / "m", tmp_path / "out", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["target"] == str(tmp_path / "out") and document["bytes"] > 0


# --- compare, on logs whose answers no model wrote --------------------------------------------------------------------

REFUSAL, ANSWER = "I can't help with that.", "Sure, here is how: mix and bake."


def _measure(folder: Path, text: str, pairs: int, kinds: tuple[str, ...] = ("compliance", "over_refusal")) -> None:
    """A measurement in which every answer is the same text."""
    prompts = folder.parent / f"mine-{pairs}.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"make cake {n}"}) + "\n" for n in range(pairs)))
    axes = [AxisSpec(kind, "mine", path=str(prompts)) for kind in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            batching, "answer", in_batches(lambda _, chats, __: [Generation(text, 5, 5, False) for _ in chats])
        )
        evaluate(tiny_model(), axes, out=folder, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: "refuses" and "answers" over 100 prompts, "partial" without one axis, "small" over 8."""
    root = tmp_path_factory.mktemp("runs")
    _measure(root / "refuses", REFUSAL, 100)
    _measure(root / "answers", ANSWER, 100)
    _measure(root / "partial", REFUSAL, 100, ("compliance",))
    _measure(root / "small", REFUSAL, 8)
    return root


@pytest.mark.parametrize(
    ("base", "candidates", "code", "verdict"),
    [
        ("refuses", ["refuses"], 0, "pass"),
        ("refuses", ["answers"], 3, "regression"),
        ("refuses", ["partial"], 4, "unmeasured"),
        ("refuses", ["refuses", "answers"], 3, "regression"),
    ],
)
def test_compare_exits_with_its_verdict(
    runs: Path, base: str, candidates: list[str], code: int, verdict: str, invoke: Invoke
) -> None:
    folders = [runs / name for name in candidates]
    done = invoke("compare", runs / base, *folders, "--json")
    assert done.code == code
    document = json.loads(done.out)
    assert (document["verdict"], document["exit_code"]) == (verdict, code)
    assert len(document["candidates"]) == len(candidates)
    person = invoke("compare", runs / base, *folders)
    assert person.code == code and person.out.startswith("# ")


def test_a_small_comparison_is_not_enough_evidence(runs: Path, invoke: Invoke) -> None:
    done = invoke("compare", runs / "small", runs / "small", "--json")
    assert done.code == 5
    assert json.loads(done.out)["verdict"] == "not enough evidence"


def test_the_policy_decides_and_its_mistakes_are_named(runs: Path, invoke: Invoke, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("margin: 0.5\n")
    assert invoke("compare", runs / "small", runs / "small", "--policy", policy).code == 0
    policy.write_text("margn: 0.5\n")
    done = invoke("compare", runs / "small", runs / "small", "--policy", policy)
    assert done.code == 1 and "margn" in done.err and done.out == ""


def test_different_data_are_not_compared(runs: Path, invoke: Invoke) -> None:
    done = invoke("compare", runs / "refuses", runs / "small")
    assert done.code == 2 and "dataset differs" in done.err and done.out == ""


def test_pages_are_written_whole_and_redacted(runs: Path, invoke: Invoke, tmp_path: Path) -> None:
    page, text = tmp_path / "deep" / "page.html", tmp_path / "page.md"
    options = ["--html", page, "--markdown", text, "--redact", "--title", "Mine", "--json"]
    done = invoke("compare", runs / "refuses", runs / "answers", *options)
    assert done.code == 3
    assert "<title>Mine" in page.read_text() and text.read_text().startswith("# ")
    assert ANSWER not in page.read_text() and ANSWER not in done.out
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("guard", "acted", "warned"), [("spf", 0, True), ("spf", 2, False), ("keel", 0, False)])
def test_a_projection_that_never_acted_is_said(
    guard: str, acted: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keel that never acts has watched, and nothing drifted; a projection that never acts has done nothing at all."""
    from trimtab.tuning import sft

    monkeypatch.setattr(sft, "run", lambda argv: sft.SftResult("out", 9, 1.0, guard, acted, 3.0))
    printed = CliRunner().invoke(cli.trimtab, ["sft"]).output
    assert f"changed {acted} of 9" in printed and ("no conflict in any step" in printed) is warned
