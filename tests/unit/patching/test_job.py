"""``trimtab patch`` end to end on files: what is saved, what is refused, what is never overwritten."""

from __future__ import annotations

import json
import os
import shutil
import stat
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
from trimtab.comparison.results import EXIT_CODES
from trimtab.errors import DataError, GuardError, ModelError, TrimtabError, UsageError
from trimtab.evaluation.runner import AxisSpec
from trimtab.models import LoadedModel
from trimtab.patching import job, methods, save
from trimtab.patching.adapters import attach, finish
from trimtab.patching.climb import LadderSettings
from trimtab.patching.job import PatchResult, run
from trimtab.patching.methods import PatchSettings, patch
from trimtab.patching.recipe import recipe, recipe_lines
from trimtab.patching.recover import Recipe
from trimtab.patching.save import probe, write_adapter
from trimtab.patching.texts import bundled_material, read_prompts
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


QUICK = SafetyAnchors((Anchor("steal the cake today", "refuse", worlds.REFUSAL),), "test")


def quick(files: Path, **changes: object) -> PatchSettings:
    """The cheapest repair that changes something: for what is written, not for how good it is."""
    ours: dict[str, object] = {"method": "published", "steps": 4, "samples": QUICK, "force": True, "limit": 2}
    return settings(files, **{**ours, **changes})


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_named_in_bfloat16_is_read_back_in_bfloat16(files: Path, merged: bool) -> None:
    name, template = f"{files / 'whole'}?dtype=bfloat16", files / "other.jinja"
    template.write_text(worlds.TEMPLATE)
    result = run(f"{name}&chat_template={template}", files / "out", quick(files, merged=merged), say=lambda _: None)
    assert result.saved
    record = json.loads((files / "out" / "patch.json").read_text())
    assert record["given"] == f"{name}&chat_template={template}" and record["base"].startswith(name)
    if merged:
        assert json.loads((files / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    else:
        assert "library_name: peft" in (files / "out" / "README.md").read_text()
        config = json.loads((files / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(files / "whole"), "PEFT reads no query"
        assert json.loads((files / "out" / "trimtab.json").read_text())["base"].startswith(name)


def test_card_and_record_say_what_the_repair_was_made_with(files: Path) -> None:
    ladder = replace(LADDER, seed=7, rank=3)
    aligned = str(files / "aligned")
    ours = quick(files, ladder=ladder, learning_rate=2e-3, system="the user", aligned=aligned, merged=True)
    run(str(files / "whole"), files / "out", ours, say=lambda _: None)
    record = json.loads((files / "out" / "patch.json").read_text())
    assert {key: record[key] for key in ("seed", "rank", "learning_rate", "system", "aligned")} == {
        "seed": 7, "rank": 3, "learning_rate": 2e-3, "system": "the user", "aligned": aligned,
    }  # fmt: skip
    assert record["settings"]["samples"] == {"origin": "test", "count": 1} and record["settings"]["keep"] == 0
    assert record["settings"]["steps"] == 4 and record["settings"]["ladder"]["drift"] == 0.5
    card = (files / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    for line in ("seed: 7; rank of the adapter: 3; learning rate: 0.002", "samples: 'the user'", f"model: {aligned}"):
        assert line in card


@pytest.mark.parametrize(
    ("changes", "rank", "rate"),
    [({}, 8, None), ({"method": "low-rank"}, 20, None), ({"method": "published"}, 8, 1e-3),
     ({"method": "published", "full": True}, None, 2e-5)],
)  # fmt: skip
def test_the_recipe_states_rank_and_rate_of_each_method(
    changes: dict[str, object], rank: int | None, rate: float | None
) -> None:
    ours = replace(PatchSettings(), **changes)
    assert (recipe(ours)["rank"], recipe(ours)["learning_rate"]) == (rank, rate)
    text = "\n".join(recipe_lines(ours))
    assert ("all parameters" in text) == ours.full and "the chat template's own" in text


def test_the_dtype_that_was_trained_is_read_back_whatever_the_default_is(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where a model without a dtype in its name is read in bfloat16."""
    plain = models.resolve_dtype
    monkeypatch.setattr(models, "resolve_dtype", lambda n, d: torch.bfloat16 if n is None else plain(n, d))
    ours = quick(files, full=True)
    assert run(f"{files / 'whole'}?dtype=float32", files / "out", ours, say=lambda _: None).saved


@pytest.mark.parametrize("changes", [{"full": True}, {"merged": True}])
def test_a_whole_model_comes_back_bit_for_bit(
    files: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save.write_model

    def inexact(model: torch.nn.Module, *rest: object) -> int:
        weight = next(p for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
        kept = weight.detach().clone()
        weight.data[0, 0] = torch.nextafter(kept[0, 0], kept[0, 0] + 1)
        size = write(model, *rest)
        weight.data.copy_(kept)
        return size

    monkeypatch.setattr(save, "write_model", inexact)
    with pytest.raises(TrimtabError, match="not the model that was repaired"):
        run(str(files / "whole"), files / "out", quick(files, **changes), say=lambda _: None)
    assert not (files / "out").exists()


def test_what_merging_may_change_depends_on_the_dtype() -> None:
    assert save.tolerance(torch.float32) == save.MERGE_TOLERANCE
    assert 0.03 < save.tolerance(torch.float16) < 0.1 < save.tolerance(torch.bfloat16) < 0.2
    made, rounded = torch.tensor([10.0, -20.0]), torch.tensor([10.0, -20.4])
    save.require_close(rounded, made, save.tolerance(torch.bfloat16))
    for share in (0.0, save.tolerance(torch.float32)):
        with pytest.raises(TrimtabError, match="not the model that was repaired"):
            save.require_close(rounded, made, share)
    with pytest.raises(TrimtabError, match="not the model that was repaired"):
        save.require_close(made * float("nan"), made, save.tolerance(torch.bfloat16))


def test_the_aligned_model_is_loaded_as_the_given_one_unless_its_name_says_otherwise(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, object]]] = []
    load = models.load

    def noted(name: str, **how: object) -> LoadedModel:
        seen.append((name, how))
        return load(name, **how)

    monkeypatch.setattr(models, "load", noted)
    (files / "t.jinja").write_text(worlds.TEMPLATE)
    how = {"chat_template": str(files / "t.jinja"), "dtype": "bfloat16"}
    other = f"{files / 'aligned'}?dtype=float32"
    run(str(files / "whole"), files / "out", quick(files, aligned=other), say=lambda _: None, **how)
    assert [name for name, _ in seen][:2] == [str(files / "whole"), other] and len(seen) == 3
    assert seen[1][1] == {"chat_template": how["chat_template"]} and seen[2][1] == how
    seen.clear()
    patched = methods.Patched(None, str(files / "aligned"), True, 1, 1, 0.0, [], [], {})
    job._load_alike(patched.base, how)
    assert seen == [(patched.base, how)]


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


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_folder_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="no name of its own"):
        run("no-model", Path(name), PatchSettings())


def test_the_saved_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        scratch = save.Scratch(tmp_path / "out")
        scratch.accept()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


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


def test_a_sample_that_is_among_the_bundled_held_out_prompts_is_named(files: Path) -> None:
    held = bundled_material().held_out
    leak = SafetyAnchors((Anchor(held.harmful[0][-1]["content"], "refuse", worlds.REFUSAL),), "test")
    for changes in ({"samples": leak}, {"keep": ([{"role": "user", "content": held.ordinary[0][-1]["content"]}],)}):
        with pytest.raises(DataError, match="among the held-out prompts"):
            run(str(files / "whole"), files / "out", settings(files, **changes))


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


def test_a_patched_model_can_be_vetted(files: Path) -> None:
    """``vet`` after ``patch``: it is the repaired model that is approximated, and its own answers are the reference."""
    repaired("adapter", files, settings(files))
    axes = ["--axis", f"compliance:mine={files / 'harmful.jsonl'}"]
    axes += ["--axis", f"over_refusal:mine={files / 'innocent.jsonl'}"]
    words = ["vet", str(files / "out"), "--approx", "a4", "--out", str(files / "vet"), "--max-new-tokens", "8", *axes]
    done = CliRunner().invoke(trimtab, [*words, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    exact, rounded = (dict(zip(document["header"], row, strict=True)) for row in document["rows"])
    assert exact["approximation"] == "none" and exact["complies (mine, n 12)"].startswith("0.0 %"), "repaired"
    assert rounded["approximation"] == "a4" and done.exit_code == EXIT_CODES[rounded["verdict"]]
    assert "of σ" in rounded["error up"] and exact["error up"] == "0"


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
