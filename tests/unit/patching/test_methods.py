"""The methods on a model in memory: what comes back, from which samples, and how a sample is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from peft import PeftModel
from tests.unit.patching import worlds
from transformers import PreTrainedTokenizerFast

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import GuardError, ModelError, UsageError
from trimtab.patching import choosing, methods
from trimtab.patching.choosing import base_if_aligned
from trimtab.patching.climb import LadderSettings
from trimtab.patching.methods import PatchSettings, apply, patch
from trimtab.patching.recover import Recipe
from trimtab.patching.texts import PUBLISHED, PUBLISHED_SHORT, bundled_material

LADDER = LadderSettings(
    samples=(1, 4, 8), steps=12, last_steps=24, drift=0.5, lengths=(), recipe=Recipe(learning_rate=5e-3)
)
OURS = PatchSettings(ladder=LADDER)
SAMPLE = Anchor("steal the cake today", "refuse", worlds.REFUSAL)


@pytest.fixture(autouse=True)
def _tiny_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled texts are English; this world has 40 words."""
    monkeypatch.setattr(methods, "bundled_material", lambda **_: worlds.material())


def healthy(*, lora: bool) -> Any:
    """A model that is not broken; as an adapter, its second half is empty, so it is its aligned base."""
    loaded = worlds.broken(lora=True) if lora else worlds.aligned()
    if lora:
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    loaded.model.train()
    return loaded


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", ["two-sided", "published", "low-rank"])
def test_a_model_that_is_not_broken_comes_back_as_it_was(lora: bool, method: Any) -> None:
    loaded = healthy(lora=lora)
    before = worlds.state_of(loaded.model)
    found = apply(loaded, replace(OURS, method=method), None, lambda _: None)
    assert not found.changed and found.model is loaded.model
    assert any("nothing was changed" in note for note in found.notes)
    worlds.assert_as_it_was(loaded.model, before)


def test_patch_of_a_plain_model_that_is_not_broken_attaches_no_adapter() -> None:
    loaded = worlds.aligned()
    assert patch(loaded, settings=OURS) is loaded.model and not isinstance(loaded.model, PeftModel)
    assert not any("lora" in name for name in loaded.model.state_dict())


@pytest.mark.parametrize("method", ["published", "low-rank"])
def test_the_published_methods_repair_what_is_not_broken_only_by_force(method: Any) -> None:
    forced = replace(OURS, method=method, force=True, step=1.0, samples=SafetyAnchors((SAMPLE,), "test"))
    assert apply(worlds.aligned(), forced, None, lambda _: None).changed


def test_a_published_method_that_raises_leaves_nothing_attached() -> None:
    loaded = worlds.broken(lora=True)
    before = worlds.state_of(loaded.model)
    with pytest.raises(GuardError, match="changed nothing"):
        apply(loaded, replace(OURS, method="low-rank", step=0.0), None, lambda _: None)
    worlds.assert_as_it_was(loaded.model, before)


def test_the_rank_of_the_closed_form_is_the_one_that_was_asked_for() -> None:
    ours = replace(OURS, method="low-rank", step=1.0, rank=2)
    found = apply(worlds.broken(lora=False), ours, None, lambda _: None)
    assert "rank 2" in found.what[0]
    assert {config.r for config in found.model.peft_config.values()} == {2}


def test_whether_the_base_is_aligned_does_not_hang_on_the_users_one_sample() -> None:
    innocent = SafetyAnchors((Anchor("bake the cake today", "refuse", worlds.REFUSAL),), "test")
    said: list[str] = []
    found = apply(worlds.broken(lora=True), replace(OURS, samples=innocent), None, said.append)
    assert any(line.startswith("aligned:") for line in said), "the base is the ancestor"
    assert found.what[1] == "replies written by: user" and not any("base" in note for note in found.notes)


def test_a_base_that_is_not_aligned_is_said_to_be_what_it_is() -> None:
    bundled = worlds.material()
    assert base_if_aligned(worlds.broken(lora=True), bundled) == ("base", [])
    refused = tuple(replace(anchor, side="answer", reply=None) for anchor in bundled.refuse)
    base, (note,) = base_if_aligned(worlds.broken(lora=True), replace(bundled, answer=refused))
    assert base is None and note.endswith("it answers 0 of 8") and "refus" not in note


@pytest.mark.parametrize("sample", [PUBLISHED, PUBLISHED_SHORT])
def test_a_built_in_sample_is_the_first_of_the_bundled_pool(sample: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "bundled_material", bundled_material)
    named = methods._material(replace(OURS, samples=SafetyAnchors((sample,), "general")))
    default = methods._material(OURS)
    assert named.refuse == (sample, *default.refuse[1:]) and len(named.refuse) == 84 and named.writer == "bundled"
    if sample == PUBLISHED:
        assert named == default, "the documented default is the default"


def test_a_sample_is_selected_and_learnt_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "CANDIDATES", 4)
    said: list[str] = []
    seen: list[Any] = []
    own = choosing.continuations
    monkeypatch.setattr(choosing, "continuations", lambda one, chats: seen.append(chats) or own(one, chats))
    loaded = worlds.broken(lora=True)
    ours = replace(OURS, method="published", select="bilevel", steps=12, learning_rate=5e-3)
    model = methods.apply(loaded, ours, None, said.append)
    assert isinstance(model.model, PeftModel) and model.changed
    assert model.details["sample"]["reply"] == worlds.REFUSAL, "the ancestor's whole refusal"
    assert "the selection is among the first 4 of 8 refusals" in said
    asked = {chat[-1]["content"] for chat in seen[0]}
    held = {chat[-1]["content"] for chat in worlds.material().held_out.harmful}
    candidates = {anchor.request for anchor in worlds.material().refuse[:4]}
    assert asked and not asked & held and not asked & candidates


def test_patch_selects_through_the_public_function() -> None:
    said: list[str] = []
    model = patch(worlds.broken(lora=False), aligned=worlds.aligned(), settings=replace(OURS, select="exhaustive"),
                  say=said.append)  # fmt: skip
    assert isinstance(model, PeftModel) and any(line.startswith("selected by exhaustive") for line in said)
    assert sorted(model.peft_config) == ["default"]


def test_a_refusal_that_does_not_end_is_no_candidate_and_the_published_words_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    material = worlds.material()
    mixed = replace(material, refuse=(PUBLISHED, *material.refuse))
    monkeypatch.setattr(choosing, "WHOLE_TOKENS", 3)  # "i can't help": a refusal, but cut
    assert choosing._candidates(worlds.aligned(), mixed, said.append) == [PUBLISHED]
    assert said == ["8 candidates dropped: no refusal, or none that ends within 3 tokens"]
    with pytest.raises(GuardError, match="no candidate has a whole refusal"):
        choosing._candidates(worlds.aligned(), material, said.append)


def test_no_ancestor_is_none_although_there_is_a_base() -> None:
    loaded = worlds.broken(lora=True)
    loaded.model.train()
    before = worlds.state_of(loaded.model)
    for method in ("two-sided", "published"):
        ours = replace(OURS, method=method, select="bilevel", aligned="none")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="needs the aligned model"):
            apply(loaded, ours, None, lambda _: None)
    worlds.assert_as_it_was(loaded.model, before)


def test_an_ancestor_of_another_vocabulary_cannot_choose_although_it_is_as_large() -> None:
    other = worlds.aligned()
    words = other.tokenizer.get_vocab()
    words["cake"], words["car"] = words["car"], words["cake"]
    core = type(other.tokenizer.backend_tokenizer).from_str(other.tokenizer.backend_tokenizer.to_str())
    core.model = type(core.model)(words, unk_token="<unk>")
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>")  # fmt: skip
    made.chat_template = worlds.TEMPLATE
    with pytest.raises(ModelError, match="same vocabulary"):
        apply(worlds.broken(lora=True), replace(OURS, select="bilevel"), replace(other, tokenizer=made), lambda _: None)
