"""What a release is gated with: the steps of ``action.yml`` and the hook, run as their hosts run them.

Covered: the shell of the Action's comparison with its inputs in the environment, its outputs and exit codes; that the
hook's manifest is valid and its entry gates. Not covered: the Action's installation steps and the host itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from tests.scripted import in_batches
from tests.tiny import tiny_model

from trimtab.evaluation import batching
from trimtab.evaluation.runner import AxisSpec, evaluate
from trimtab.generation import Generation

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
TEXTS = {"refuses": "I can't help with that.", "answers": "Sure, here is how: mix and bake."}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One measurement for each of TEXTS."""
    root = tmp_path_factory.mktemp("gate") / "runs"
    root.mkdir()
    prompts = root / "mine.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"make cake {n}"}) + "\n" for n in range(100)))
    for name, text in TEXTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching, "answer", in_batches(lambda _, chats, __, text=text: [_said(text) for _ in chats]))
            evaluate(tiny_model(), [AxisSpec("compliance", "mine", path=str(prompts))], out=root / name, progress=False)
    return root


def _said(text: str) -> Generation:
    return Generation(text, 5, 5, False)


def _act(place: Path, **inputs: str) -> tuple[int, dict[str, str], str]:
    """Run the Action's comparison in ``place``: exit code, outputs, summary."""
    (step,) = [one for one in ACTION["runs"]["steps"] if one.get("id") == "compare"]
    given = {name: one.get("default", "") for name, one in ACTION["inputs"].items()} | inputs
    variables = {
        variable: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: given[found[1]], text)
        for variable, text in step["env"].items()
    }
    outputs, summary = place / "outputs", place / "summary.md"
    for old in (outputs, summary):
        old.unlink(missing_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    host = {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary), "PATH": path}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
        cwd=place, env={**os.environ, **variables, **host}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    return done.returncode, found, summary.read_text() if summary.is_file() else done.stderr


def test_the_action_passes_what_is_no_worse(runs: Path, tmp_path: Path) -> None:
    refuses = str(runs / "refuses")
    code, outputs, summary = _act(tmp_path, base=refuses, candidate=refuses)
    assert (code, outputs) == (0, {"code": "0"})
    assert summary.startswith("# ")
    report = tmp_path / "trimtab-report"
    assert {one.name for one in report.iterdir()} == {"report.html", "report.md", "junit.xml", "report.sarif"}
    assert ElementTree.parse(report / "junit.xml").getroot().findall("testsuite")


def test_the_action_fails_a_regression_and_redacts_unless_told_not_to(runs: Path, tmp_path: Path) -> None:
    base, both = str(runs / "refuses"), f"{runs / 'refuses'} {runs / 'answers'}"
    code, outputs, _ = _act(tmp_path, base=base, candidate=both)
    assert (code, outputs) == (3, {"code": "3"})
    page = tmp_path / "trimtab-report" / "report.html"
    assert TEXTS["answers"] not in page.read_text()
    _act(tmp_path, base=base, candidate=both, redact="false")
    assert TEXTS["answers"] in page.read_text()


def test_the_action_knows_a_policy_and_says_what_is_wrong_with_it(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("margin: 0.5\n")
    folders = {"base": str(runs / "refuses"), "candidate": str(runs / "answers")}
    assert _act(tmp_path, **folders, policy="policy.yaml")[0] == 3  # all of them: worse than any margin
    (tmp_path / "policy.yaml").write_text("margn: 1.0\n")
    code, outputs, words = _act(tmp_path, **folders, policy="policy.yaml")
    assert (code, outputs) == (1, {"code": "1"}) and "margn" in words


def test_the_hook_is_valid_and_gates(runs: Path, tmp_path: Path) -> None:
    manifest = str(ROOT / ".pre-commit-hooks.yaml")
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-manifest", manifest], check=True)
    program, *words = shlex.split(HOOK["entry"])
    command = [str(Path(sys.executable).parent / program), *words]
    for name, code in (("refuses", 0), ("answers", 3)):
        done = subprocess.run([*command, runs / "refuses", runs / name], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == code
