"""The two-sided training: distances against direct computations, its rate, what it needs of an ancestor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.patching import worlds

from trimtab.anchors import Anchor
from trimtab.patching.adapters import attach
from trimtab.patching.climb import lessons_by
from trimtab.patching.heldout import Bounds, Instrument, measured_logits, reply_logits, same_vocabulary
from trimtab.patching.recover import AVERAGED, Lesson, Recipe, TwoSided
from trimtab.patching.texts import written_by
from trimtab.tuning.pools import tokenise


def test_the_distance_is_the_divergence_from_the_ancestor_along_its_own_words() -> None:
    ancestor, broken = worlds.aligned(), worlds.broken(lora=False)
    material = written_by(ancestor, worlds.material())
    lesson = lessons_by(ancestor, broken, material, Recipe(bf16=False)).refuse
    assert all(len(row.reply) == 3 for row in lesson.rows)
    found = lesson.distances([2], reply_logits(broken, [lesson.rows[2]]))
    row = lesson.rows[2]
    ids = torch.tensor([row.prompt + row.reply])
    with torch.no_grad():
        p, q = (
            m.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double().softmax(-1) for m in (ancestor, broken)
        )
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    assert expected > 1.0, "the broken model must be far away here"
    assert float(found[0]) == pytest.approx(expected, rel=1e-4)
    itself = lesson.distances([2], reply_logits(ancestor, [row]))
    assert float(itself[0]) == pytest.approx(0.0, abs=1e-5)


def test_words_are_the_target_without_an_ancestor_with_another_vocabulary_and_for_a_users_own_sample() -> None:
    ancestor, broken = worlds.aligned(), worlds.broken(lora=False)
    material = written_by(ancestor, worlds.material())
    assert lessons_by(None, broken, material, Recipe(bf16=False)).refuse.logits is None
    other = replace(ancestor, tokenizer=worlds.tokenizer())
    assert same_vocabulary(broken, other)
    other.tokenizer.add_tokens(["another"])
    assert not same_vocabulary(broken, other)
    assert lessons_by(other, broken, material, Recipe(bf16=False)).answer.logits is None
    own = lessons_by(ancestor, broken, replace(material, writer="user"), Recipe(bf16=False))
    assert own.refuse.logits is None and own.answer.logits is not None
    row = tokenise(broken, Anchor("steal the cake today", "refuse", worlds.REFUSAL), None, 3)
    logits = reply_logits(broken, [row])
    expected = -logits[0].log_softmax(-1)[range(3), row.reply].mean()
    torch.testing.assert_close(Lesson([row]).distances([0], logits)[0], expected)


def test_looks_see_the_bias_corrected_average_and_training_goes_on_from_the_latest() -> None:
    bench = attach(worlds.broken(lora=True))
    trainer = TwoSided(bench.loaded, Lesson([]), Recipe(learning_rate=1e-3))
    row = tokenise(bench.loaded, Anchor("steal the cake today", "refuse", worlds.REFUSAL), None, 3)
    trainer.use(Lesson([row]), Lesson([]))
    states = []
    for _ in range(4):
        trainer.step()
        states.append(bench.read())
    weights = [AVERAGED ** (3 - i) for i in range(4)]
    with trainer.averaged():
        seen = bench.read()
    for name, value in seen.items():
        expected = sum(w * state[name] for w, state in zip(weights, states, strict=True)) / sum(weights)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, states[-1][name]) for name, value in bench.read().items())


def test_drift_on_ordinary_prompts_is_from_the_nearer_of_given_model_and_ancestor() -> None:
    bench = attach(worlds.broken(lora=True))
    held = worlds.material().held_out
    harmful = replace(held, ordinary=held.harmful)  # where the two differ most
    instrument = Instrument(bench, harmful)
    with bench.as_base() as base:
        far = instrument.drift(base)
        assert far > 1.0, "the ancestor is far from the given model"
        instrument.at_ancestor(base)
        assert instrument.drift(base) == pytest.approx(0.0, abs=1e-5)
    assert instrument.drift(bench.loaded) == pytest.approx(0.0, abs=1e-5)
    watched = Instrument(bench, replace(harmful, kept=held.harmful[:4]))
    with bench.as_base() as base:
        watched.at_ancestor(base)
        assert watched.drift(base) > 1.0, "on the user's own prompts only the given model counts"


def test_a_look_far_outside_asks_a_few_prompts_only() -> None:
    instrument = Instrument(attach(worlds.broken(lora=True)), worlds.material().held_out)
    hurried, whole = instrument.look(Bounds(0.1, 0.1, 0.1)), instrument.look()
    assert hurried.harmful == 4 and hurried.over_refusal is None and hurried.compliance > 0.5
    assert whole.harmful == 16 and whole.over_refusal is not None
    over = instrument.look(Bounds(1.0, -1.0, 0.1))  # refuses too much by any measure: its drift is not asked
    assert over.over_refusal == whole.over_refusal and over.drift is None and whole.drift is not None


def test_measured_logits_are_those_of_a_pass_with_gradients() -> None:
    loaded = worlds.aligned()
    rows = [tokenise(loaded, Anchor(text, "refuse", worlds.REFUSAL), None, 4) for text in worlds.requests(["hack"], 1)]
    for one, other in zip(measured_logits(loaded, rows, at_once=2), reply_logits(loaded, rows), strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-4, rtol=1e-4)
