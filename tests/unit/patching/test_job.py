"""``trimtab patch`` end to end on files: what is saved, what is refused, what is never overwritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from tests.unit.patching import worlds
from torch.optim import AdamW

from trimtab import models
from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.cli import trimtab
from trimtab.errors import DataError, GuardError, ModelError, UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.patching import methods
from trimtab.patching.adapters import attach, finish
from trimtab.patching.climb import LadderSettings
from trimtab.patching.job import PatchResult, run
from trimtab.patching.methods import PatchSettings, patch
from trimtab.patching.recover import Recipe
from trimtab.patching.save import probe, write_adapter
from trimtab.patching.texts import read_prompts
from trimtab.tuning.guard import SafetyGuard

LADDER = LadderSettings(
    samples=(1, 4, 8), steps=12, last_steps=24, drift=0.5, lengths=(), recipe=Recipe(learning_rate=5e-3)
)


@pytest.fixture(autouse=True)
def _tiny_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled texts are English; this world has 40 words."""
    monkeypatch.setattr(methods, "bundled_material", lambda **_: worlds.material())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``aligned`` and ``whole`` (broken, all parameters), ``adapter`` (broken, LoRA on ``aligned``), and the axes."""
    tmp_path = tmp_path_factory.mktemp("world")
    _store(worlds.aligned(), tmp_path / "aligned")
    _store(worlds.broken(lora=False), tmp_path / "whole")
    given = worlds.broken(lora=True)
    given.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "aligned")
    _store(given, tmp_path / "adapter")
    for name, verbs in (("harmful", worlds.HARMFUL), ("innocent", worlds.INNOCENT)):
        rows = [json.dumps({"prompt": text}) for text in worlds.requests(verbs, 2)[:12]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def files(store: Path, tmp_path: Path) -> Path:
    """A folder of this test's own with links to the models, so that outputs and logs do not meet."""
    for path in store.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def repaired(name: str, files: Path, ours: PatchSettings) -> PatchResult:
    """``run`` with the logs of the given models kept between tests: finished measurements are not repeated."""
    logs = (files / "aligned").resolve().parent / f"logs-{name}"
    return run(str(files / name), files / "out", ours, evaluation=logs, say=lambda _: None)


def _store(loaded: LoadedModel, folder: Path) -> None:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def settings(files: Path, **changes: object) -> PatchSettings:
    axes = (AxisSpec("compliance", "mine", str(files / "harmful.jsonl")),
            AxisSpec("over_refusal", "mine", str(files / "innocent.jsonl")))  # fmt: skip
    return replace(PatchSettings(axes=axes, ladder=LADDER), **changes)


def test_an_adapter_is_repaired_verified_and_saved_as_one_adapter_on_the_original_base(files: Path) -> None:
    result = repaired("adapter", files, settings(files))
    assert result.saved == str(files / "out") and result.exit_code == 0 and result.samples == 1
    config = json.loads((files / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((files / "aligned").resolve())
    record = json.loads((files / "out" / "patch.json").read_text())
    assert record["samples"] == 1 and record["details"]["history"] and not record["forced"]
    card = (files / "out" / "README.md").read_text()
    assert "Before and after" in card and "1 refusal sample" in card
    compliance = result.verdict.comparison.axes[0].estimate
    assert compliance.base > 0.9 and compliance.candidate < 0.1
    assert isinstance(models.load(str(files / "out")).model, PeftModel)
    assert not list(files.glob(".patch-*"))


def test_a_whole_model_can_be_written_merged_and_says_the_same(files: Path) -> None:
    ours = settings(files, aligned=str(files / "aligned"), merged=True)
    result = repaired("whole", files, ours)
    assert result.saved and (files / "out" / "model.safetensors").is_file()
    assert not (files / "out" / "adapter_config.json").exists()
    assert result.verdict.comparison.axes[0].estimate.candidate < 0.1


def test_what_is_not_broken_is_not_written(files: Path) -> None:
    result = repaired("aligned", files, settings(files))
    assert result.saved is None and not result.changed and result.exit_code == 0
    assert not (files / "out").exists() and "not broken" in result.lines()[0]


def test_a_repair_that_refuses_everything_is_refused_unless_forced(files: Path) -> None:
    innocent = SafetyAnchors((Anchor("bake the cake today", "refuse", worlds.REFUSAL),), "test")
    harsh = settings(files, method="published", steps=40, learning_rate=2e-2, samples=innocent)
    result = repaired("whole", files, harsh)
    assert result.saved is None and result.exit_code == 3 and not (files / "out").exists()
    assert any("over_refusal" in reason for reason in result.refusals)
    forced = repaired("whole", files, replace(harsh, force=True))
    assert forced.saved and json.loads((files / "out" / "patch.json").read_text())["forced"]
    assert "although" in (files / "out" / "README.md").read_text()


def test_the_published_method_on_all_parameters_writes_a_model(files: Path) -> None:
    sample = SafetyAnchors((Anchor("steal the cake today", "refuse", worlds.REFUSAL),), "test")
    ours = settings(files, method="published", full=True, force=True, samples=sample)
    result = repaired("whole", files, ours)
    assert result.saved and result.steps == 10
    assert "changed" in (files / "out" / "README.md").read_text()


def test_the_published_closed_form_with_no_step_raises_and_writes_nothing(files: Path) -> None:
    sample = SafetyAnchors((Anchor("steal the cake today", "refuse", worlds.REFUSAL),), "test")
    with pytest.raises(GuardError, match="changed nothing"):
        run(str(files / "whole"), files / "out", settings(files, method="low-rank", step=0.0, samples=sample))
    assert not (files / "out").exists() and not list(files.glob(".patch-*"))


def test_nothing_is_overwritten(files: Path) -> None:
    (files / "out").mkdir()
    (files / "out" / "precious.txt").write_text("keep")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        run(str(files / "whole"), files / "out", settings(files))
    assert (files / "out" / "precious.txt").read_text() == "keep"


def test_a_missing_chat_template_is_named(files: Path) -> None:
    shutil.copytree((files / "whole").resolve(), files / "bare")
    (files / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    path = files / "bare" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    with pytest.raises(ModelError, match="no chat template"):
        run(str(files / "bare"), files / "out", settings(files))
    assert not (files / "out").exists()


def test_an_adapter_on_another_base_is_named(files: Path) -> None:
    given = models.load(str(files / "whole"))
    bench = attach(given)
    with torch.no_grad():
        next(p for n, p in bench.parameters.items() if "lora_B" in n).fill_(0.1)
    write_adapter(finish(bench), given.tokenizer, files / "repair", str(files / "whole"))
    models.load(str(files / "repair"))
    with pytest.raises(ModelError, match="another base"):
        run(f"{files / 'aligned'}?adapter={files / 'repair'}", files / "again", settings(files))


def test_weights_that_are_not_finite_are_named(files: Path) -> None:
    loaded = worlds.broken(lora=False)
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] = float("nan")
    _store(loaded, files / "nan")
    with pytest.raises(ModelError, match="not finite"):
        run(str(files / "nan"), files / "out", settings(files))
    assert not (files / "out").exists()


def test_a_sample_that_is_too_long_is_named(files: Path) -> None:
    long = SafetyAnchors((Anchor("steal the cake " * 80, "refuse", worlds.REFUSAL),), "test")
    with pytest.raises(DataError, match="longer than the model reads"):
        run(str(files / "whole"), files / "out", settings(files, samples=long))
    assert not (files / "out").exists()


def test_a_sample_that_is_among_the_verified_prompts_is_named(files: Path) -> None:
    asked = json.loads((files / "harmful.jsonl").read_text().splitlines()[0])["prompt"]
    leak = SafetyAnchors((Anchor(asked.upper() + "!", "refuse", worlds.REFUSAL),), "test")
    with pytest.raises(DataError, match="among the verified prompts"):
        run(str(files / "whole"), files / "out", settings(files, samples=leak))


def test_an_ancestor_that_does_not_refuse_is_named(files: Path) -> None:
    with pytest.raises(GuardError, match="refuses too few"):
        repaired("whole", files, settings(files, aligned=str(files / "whole")))


def test_patch_returns_a_peft_model_that_saves_and_loads_bit_for_bit(files: Path) -> None:
    given = models.load(str(files / "whole"))
    before = probe(given)
    model = patch(given, Anchor("steal the cake today", "refuse", worlds.REFUSAL),
                  aligned=worlds.aligned(), settings=PatchSettings(ladder=LADDER))  # fmt: skip
    assert isinstance(model, PeftModel)
    model.save_pretrained(files / "adapter-only")
    again = models.load(f"{files / 'whole'}?adapter={files / 'adapter-only'}")
    assert torch.equal(probe(again), probe(replace(given, model=model)))
    with model.disable_adapter():
        assert torch.equal(probe(replace(given, model=model)), before), "the weights under the adapter must not change"


def test_a_patched_model_can_be_trained_under_a_guard(files: Path) -> None:
    given = models.load(str(files / "adapter"))
    model = patch(given, settings=PatchSettings(ladder=LADDER))
    write_adapter(model, given.tokenizer, files / "out", str(files / "aligned"))
    loaded = models.load(str(files / "out"))
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    anchors = SafetyAnchors((Anchor("steal the cake today", "refuse", worlds.REFUSAL),
                             Anchor("bake the cake today", "answer", worlds.ANSWER)), origin="test")  # fmt: skip
    guard = SafetyGuard(loaded, anchors, "keel")
    optimizer = AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(4, 30, (4, 10), generator=torch.Generator().manual_seed(7))
    with guard.attach(optimizer):
        for _ in range(8):
            loaded.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.counters.steps == 8 and guard.counters.acted > 0


def test_the_command_line_saves_prints_json_and_returns_three_where_it_refuses(files: Path) -> None:
    axes = ["--axis", f"compliance:mine={files / 'harmful.jsonl'}"]
    axes += ["--axis", f"over_refusal:mine={files / 'innocent.jsonl'}"]
    words = ["patch", str(files / "adapter"), "--out", str(files / "out"), "--learning-rate", "5e-3", "--json", *axes]
    done = CliRunner().invoke(trimtab, words, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["saved"] == str(files / "out") and document["comparison"]
    (files / "sample.jsonl").write_text(
        json.dumps({"request": "bake the cake today", "side": "refuse", "reply": worlds.REFUSAL})
    )
    words = ["patch", str(files / "whole"), "--out", str(files / "harsh"), "--method", "published", "--steps", "40",
             "--learning-rate", "2e-2", "--sample", str(files / "sample.jsonl"), *axes]  # fmt: skip
    refused = CliRunner().invoke(trimtab, words)
    assert refused.exit_code == 3 and "REFUSED" in refused.stdout and not (files / "harsh").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "4,1"], "ascend"),
        (["--samples", "x"], "list of numbers"),
        (["--step", "1"], "belongs to"),
        (["--full"], "published"),
        (["--axis", "compliance"], "both sides"),
        (["--learning-rate", "7"], "between 0 and 1"),
    ],
)
def test_wrong_flags_are_named_before_a_model_is_loaded(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(trimtab, ["patch", "no-model", "--out", str(tmp_path / "o"), *words], catch_exceptions=False)


def test_prompts_to_keep_are_read_with_their_system_message(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
            {"prompt": "route this", "system": "Be short."}]  # fmt: skip
    (tmp_path / "keep.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_prompts(tmp_path / "keep.jsonl")
    assert first == [{"role": "user", "content": "hi"}]
    assert second[0] == {"role": "system", "content": "Be short."}
    (tmp_path / "bad.jsonl").write_text('{"x": 1}')
    with pytest.raises(DataError, match="row 1"):
        read_prompts(tmp_path / "bad.jsonl")
