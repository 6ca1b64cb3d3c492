"""The repair from start to end on a tiny model that was aligned and then broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.patching import worlds

from trimtab.anchors import Anchor
from trimtab.errors import DataError, GuardError, ModelError, UsageError
from trimtab.patching.adapters import attach
from trimtab.patching.climb import Climb, LadderSettings, Rung
from trimtab.patching.heldout import Bounds, Continuations, Instrument, Look, divergence
from trimtab.patching.ladder import bounds_for, notes_on, repair
from trimtab.patching.recover import Recipe, one_shot
from trimtab.patching.texts import PUBLISHED, Writer, bundled_material, near_duplicates, require_fit, written_by
from trimtab.tuning.pools import reader_for, tokenise

SETTINGS = LadderSettings(
    samples=(1, 4, 8), steps=12, last_steps=24, drift=0.5, lengths=(), recipe=Recipe(learning_rate=5e-3)
)


def test_one_sample_of_the_ancestors_own_restores_refusals_and_answers() -> None:
    loaded, said = worlds.broken(lora=True), []
    found = repair(loaded, worlds.material(), ancestor="base", settings=SETTINGS, say=said.append)
    assert found.status == "repaired" and found.chosen is not None
    assert found.given.compliance > 0.9 and found.chosen.look.compliance <= 0.05
    assert found.chosen.look.over_refusal <= 0.05 and found.chosen.samples == 1
    assert found.used[0].reply == worlds.REFUSAL and found.writer == "ancestor"
    assert any("complies" in line for line in said)
    instrument = Instrument(found.bench, worlds.material().held_out)
    assert instrument.given == found.given, "the given model itself must be as it was"


def test_without_an_ancestor_more_samples_are_used_and_that_is_said() -> None:
    found = repair(worlds.broken(lora=False), worlds.material(), settings=SETTINGS)
    assert found.status == "repaired" and found.chosen is not None
    assert found.chosen.look.compliance <= 0.1
    if found.chosen.samples > 1:
        assert f"one sample did not suffice: {found.chosen.samples} were used" in found.notes
    assert any("no aligned ancestor" in note for note in found.notes)


def test_a_model_that_is_not_broken_is_left_alone() -> None:
    loaded = worlds.aligned()
    found = repair(loaded, worlds.material(), settings=SETTINGS)
    assert found.status == "not broken" and found.chosen is None and found.bench.size() == 0
    assert any("nothing was changed" in note for note in found.notes)


def test_force_repairs_it_all_the_same() -> None:
    found = repair(
        worlds.aligned(),
        worlds.material(),
        settings=replace(SETTINGS, force=True, steps=2, last_steps=2, check_every=2),
    )
    assert found.status != "not broken" and found.bench.size() > 0


def test_bounds_out_of_reach_are_reported_not_hidden() -> None:
    strict = replace(SETTINGS, drift=0.0, steps=2, last_steps=2, check_every=2, samples=(1,))
    found = repair(worlds.broken(lora=True), worlds.material(), ancestor="base", settings=strict)
    assert found.status == "bounds not met"
    assert any("came closest" in note for note in found.notes)
    best = min(found.history, key=lambda rung: found.bounds.excess(rung.look))
    assert found.chosen == best


def test_the_closed_form_is_tried_first_at_the_best_length_and_recorded() -> None:
    def distance(length: float) -> float:
        tried = replace(SETTINGS, lengths=(length,), samples=(1,), steps=1, last_steps=1)
        model = worlds.broken(lora=True)
        seen: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            own = Climb._distance
            patch.setattr(Climb, "_distance", lambda self: seen.append(own(self)) or seen[-1])
            repair(model, worlds.material(), ancestor="base", settings=tried)
        return seen[0]

    lengths = (1.0, 4.0, 1000.0)
    best = min(lengths, key=distance)
    found = repair(
        worlds.broken(lora=True), worlds.material(), ancestor="base", settings=replace(SETTINGS, lengths=lengths)
    )
    assert found.history[0].stage == f"closed form x{best:g}" and found.history[0].steps == 0
    assert best < 1000.0 and found.history[1].stage == "training", "one look is spent on it"
    assert found.rank is not None and found.rank.energy[20] > 0.99


def test_the_handful_is_left_out_where_one_sample_is_far_from_enough() -> None:
    hard = replace(SETTINGS, drift=0.0, steps=2, last_steps=6, check_every=2, first_check=4)
    climbed = repair(worlds.broken(lora=True), worlds.material(), ancestor="base", settings=replace(hard, hopeless=2.0))
    skipped = repair(worlds.broken(lora=True), worlds.material(), ancestor="base", settings=replace(hard, hopeless=0.0))
    assert [(rung.samples, rung.steps) for rung in climbed.history] == [(1, 2), (4, 2), (8, 4), (8, 6)]
    assert [(rung.samples, rung.steps) for rung in skipped.history] == [(1, 2), (8, 4), (8, 6)]


def test_an_ancestor_without_refusals_raises() -> None:
    with pytest.raises(GuardError, match="refuses too few"):
        repair(worlds.broken(lora=False), worlds.material(), ancestor=worlds.broken(lora=False), settings=SETTINGS)


def test_base_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="not an adapter"):
        repair(worlds.broken(lora=False), worlds.material(), ancestor="base", settings=SETTINGS)


def test_weights_that_are_not_finite_raise_before_anything_is_done() -> None:
    loaded = worlds.broken(lora=False)
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[3] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        repair(loaded, worlds.material(), settings=SETTINGS)


def test_a_learning_rate_that_explodes_raises() -> None:
    wild = replace(SETTINGS, recipe=Recipe(learning_rate=1e30), samples=(8,))
    with pytest.raises(GuardError, match=r"not finite|not a number"):
        repair(worlds.broken(lora=False), worlds.material(), settings=wild)


def test_a_sample_that_does_not_fit_raises() -> None:
    loaded = worlds.aligned()
    with pytest.raises(DataError, match="longer than the model reads"):
        require_fit(loaded, [Anchor("steal the cake " * 60, "refuse", "no")], None)
    loaded.tokenizer.chat_template = worlds.TEMPLATE.replace("m['content']", "m['content'][:5]")
    with pytest.raises(DataError, match="cuts a sample"):
        require_fit(loaded, [Anchor("steal the cake today", "refuse", worlds.REFUSAL)], None)


def test_bounds() -> None:
    bounds = Bounds(0.1, 0.2, 0.3)
    assert bounds.met(Look(0.1, 0.2, 0.3, 10, 10))
    assert bounds.excess(Look(0.2, 0.3, 0.5, 10, 10)) == pytest.approx(0.4)
    assert bounds.excess(Look(0.5, None, None, 10, 10)) > bounds.excess(Look(0.5, 0.9, 0.9, 10, 10))
    given = Look(1.0, 0.0, None, 10, 10)
    relative = bounds_for(given, Look(0.1, 0.3, None, 10, 10), LadderSettings())
    assert relative.compliance == pytest.approx(0.15) and relative.over_refusal == pytest.approx(0.35)
    assert bounds_for(given, None, LadderSettings()).compliance == pytest.approx(0.10)


def test_divergence_is_zero_on_itself_and_matches_a_direct_computation() -> None:
    loaded, other = worlds.aligned(), worlds.broken(lora=False)
    instrument = Instrument(attach(worlds.aligned()), worlds.material().held_out)
    assert divergence(loaded, instrument.ordinary) == pytest.approx(0.0, abs=1e-6)
    row, target = instrument.ordinary.rows[0], instrument.ordinary.logits[0]
    ids = torch.tensor([row.prompt + row.reply])
    with torch.no_grad():
        p, q = (
            m.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double().softmax(-1) for m in (loaded, other)
        )
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    assert divergence(other, Continuations([row], [target])) == pytest.approx(expected, rel=1e-3)


def test_one_shot_is_adamw_with_the_groups_betas() -> None:
    loaded, again = worlds.broken(lora=False), worlds.broken(lora=False)
    sample = Anchor("steal the cake today", "refuse", worlds.REFUSAL)
    losses = one_shot(loaded, sample, steps=3, learning_rate=1e-3)
    assert losses[2] < losses[0]
    text = again.tokenizer.apply_chat_template(
        [{"role": "user", "content": sample.request}], tokenize=False, add_generation_prompt=True
    )
    prompt = again.tokenizer(text, add_special_tokens=False)["input_ids"]
    reply = [*again.tokenizer(worlds.REFUSAL, add_special_tokens=False)["input_ids"], again.tokenizer.eos_token_id]
    ids = torch.tensor([prompt + reply])
    labels = torch.tensor([[-100] * len(prompt) + reply])
    optimizer = torch.optim.AdamW(again.model.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0)
    for _ in range(3):
        again.model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(again.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_the_bundled_texts_do_not_overlap_with_each_other_or_with_evaluation() -> None:
    from trimtab import data

    found = bundled_material(refusals=84, answers=84, ordinary=100, held_out=84)
    learnt = [a.request for a in (*found.refuse, *found.answer)] + [c[-1]["content"] for c in found.ordinary]
    held = [c[-1]["content"] for part in (found.held_out.harmful, found.held_out.innocent, found.held_out.ordinary)
            for c in part]  # fmt: skip
    judged = [text for p in data.requests("eval") for text in (p.harmful, p.benign)] + data.instructions("eval")
    assert near_duplicates(learnt, held) == []
    assert near_duplicates([*learnt, *held], judged) == []
    assert found.refuse[0] == PUBLISHED
    assert near_duplicates(["Stop, thief!"], ["stop thief"]) == ["Stop, thief!"]


def test_the_ancestor_drops_what_it_would_say_the_wrong_way() -> None:
    material = worlds.material()
    mixed = replace(material, refuse=(*material.refuse, Anchor("bake the cake today", "refuse", "x")))
    written = written_by(worlds.aligned(), mixed)
    assert [a.request for a in written.refuse] == [a.request for a in material.refuse]
    assert all(a.reply == worlds.ANSWER for a in written.answer)
    own = written_by(worlds.aligned(), replace(material, writer="user"))
    assert own.refuse == material.refuse and own.writer == "user", "a user's sample keeps its words"
    silent = replace(material, refuse=tuple(replace(a, reply=None) for a in material.refuse), writer="user")
    assert written_by(worlds.aligned(), silent).writer == "ancestor", "words that the user did not give are not theirs"


def test_the_users_own_words_are_learnt_although_there_is_an_ancestor() -> None:
    own, cost = replace(worlds.material(), writer="user"), {}
    brief = replace(SETTINGS, samples=(1,), last_steps=12)
    for material in (own, worlds.material()):
        found = repair(worlds.broken(lora=True), material, ancestor="base", settings=brief)
        row = tokenise(found.bench.loaded, own.refuse[0], None, 3)
        cost[found.writer] = float(reader_for(found.bench.loaded, found.bench.model).measure([row]))
        assert found.used[0].reply == (own.refuse[0].reply if found.writer == "user" else worlds.REFUSAL)
    assert cost["user"] < cost["ancestor"] - 1, "nats a token of the user's own words"


@pytest.mark.parametrize(("writer", "whose"), [("user", "your own"), ("bundled", "bundled")])
def test_without_an_ancestor_it_is_said_whose_refusals_were_learnt(writer: Writer, whose: str) -> None:
    brief = replace(SETTINGS, samples=(1,), last_steps=1)
    found = repair(worlds.broken(lora=True), replace(worlds.material(), writer=writer), settings=brief)
    assert f"no aligned ancestor: {whose} refusals" in found.notes[0]


def test_what_did_not_suffice_is_what_was_tried() -> None:
    look = Look(0.0, 0.0, 0.0, 10, 10)
    assert notes_on(Rung("training", 84, 4, look, 1.0), LadderSettings(samples=(6, 84)), "repaired") == [
        "6 samples did not suffice: 84 were used"
    ]
    assert notes_on(Rung("training", 6, 4, look, 1.0), LadderSettings(), "repaired") == [
        "one sample did not suffice: 6 were used"
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_a_repair_that_raises_leaves_nothing_attached(lora: bool) -> None:
    loaded = worlds.broken(lora=lora)
    before = worlds.state_of(loaded.model)
    wild = replace(SETTINGS, recipe=Recipe(learning_rate=1e30), samples=(8,))
    with pytest.raises(GuardError, match=r"not finite|not a number"):
        repair(loaded, worlds.material(), settings=wild)
    worlds.assert_as_it_was(loaded.model, before)
