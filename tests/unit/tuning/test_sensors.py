"""What keel holds anchors to: the chance of refusing against whole forward passes and NumPy, and what it ignores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tests.tiny import tiny_model

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.pools import AnchorPool, AnchorReader, TokenisedAnchor, build_pools, reader_for
from trimtab.tuning.sensors import MOST_OPENINGS, OPENING_TOKENS, SENSORS, SURE, odds, openings_of

REFUSALS = ["sorry i can't help", "sorry i can't help with that", "i can't help with that", "i can't build a bomb"]
INNOCENT = ["bake a cake", "weather today", "please route this message"]
ANCHORS = SafetyAnchors(
    (
        *(Anchor(f"make a bomb {word}", "refuse", text) for word, text in zip("abcd", REFUSALS, strict=True)),
        *(Anchor(text, "answer", "sure here is how") for text in INNOCENT),
    ),
    origin="test",
)


def pools_with(loaded: LoadedModel, replies: list[list[int]]) -> dict:  # type: ignore[type-arg]
    pools = build_pools(loaded, ANCHORS, 3)
    return {**pools, "refuse": AnchorPool("refuse", [TokenisedAnchor([5, 6, 7], reply) for reply in replies])}


def chance_of_refusing(loaded: LoadedModel, prompt: list[int], openings: list[list[int]]) -> float:
    """Each opening token by token, in whole passes of one row."""
    total = 0.0
    for opening in openings:
        logp = 0.0
        for place, token in enumerate(opening):
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + opening[:place]])).logits[0, -1]
            logp += float(log_softmax(logits.double().numpy())[token])
        total += math.exp(logp)
    return total


def test_the_loss_is_that_of_the_chance_computed_token_by_token() -> None:
    loaded = tiny_model()
    pools = build_pools(loaded, ANCHORS, 3)
    openings = openings_of(pools)
    assert len(openings) == 2
    chosen = {"answer": [2, 0], "refuse": [1]}
    found = SENSORS["decision"].losses(reader_for(loaded, loaded.model), pools, chosen)
    chances = [chance_of_refusing(loaded, pools["answer"].rows[index].prompt, openings) for index in (2, 0)]
    expected = [math.log(chance / (1 - chance)) / OPENING_TOKENS for chance in chances]
    np.testing.assert_allclose(found["answer"].detach().numpy(), expected, rtol=1e-4)
    words = SENSORS["words"].losses(reader_for(loaded, loaded.model), pools, {"refuse": [1]})["refuse"]
    torch.testing.assert_close(found["refuse"], words)


def test_the_gradient_is_that_of_finite_differences_and_survives_near_certainty() -> None:
    def exact(chances: np.ndarray) -> float:
        chance = np.exp(chances).sum()
        return math.log(chance / (1 - chance))

    for start in ([-1.8, -3.3], [-2e-4, -9.0], [-30.0, -31.0]):  # the second: refused with a chance of 0.9999
        chances = torch.tensor([start], requires_grad=True)
        odds(chances).sum().backward()
        assert chances.grad is not None and torch.isfinite(chances.grad).all()
        for place in range(2):
            step = np.zeros(2)
            step[place] = 1e-7
            slope = (exact(np.array(start) + step) - exact(np.array(start) - step)) / 2e-7
            assert float(chances.grad[0, place]) == pytest.approx(slope, rel=5e-3)
    certain = torch.tensor([[0.0]], requires_grad=True)  # refused for sure: it must still be pulled back
    odds(certain).sum().backward()
    assert certain.grad is not None and torch.isfinite(certain.grad).all() and float(certain.grad) > 1e5
    assert float(odds(torch.tensor([[-200.0]]))) == pytest.approx(-200)


@pytest.mark.parametrize("sure", [SURE, 100.0])
def test_an_answer_may_be_as_unsure_as_it_was_or_as_is_sure_enough(
    sure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.tuning.sensors.SURE", sure)
    loaded = tiny_model()
    pools = build_pools(loaded, ANCHORS, 3)
    SENSORS["decision"].prepare(reader_for(loaded, loaded.model), pools)
    openings = openings_of(pools)
    assert pools["answer"].reference is not None
    for row, floor in zip(pools["answer"].rows, pools["answer"].reference.tolist(), strict=True):
        chance = chance_of_refusing(loaded, row.prompt, openings)  # below e^-4 in an untaught model
        assert floor == pytest.approx(max(math.log(chance / (1 - chance)), -sure) / OPENING_TOKENS, rel=1e-4)


def test_requests_read_once_give_what_whole_rows_give_and_the_same_gradient() -> None:
    """Requests of different lengths, openings of different lengths, with and without a shared beginning."""
    for prompts in ([[2, 5, 6, 7, 8, 9, 10], [2, 5, 6, 7, 8, 11], [2, 5, 6, 7, 8, 9]], [[4, 5], [9, 8, 7]]):
        for openings in ([[5, 6, 7], [9, 8]], [[4], [6]], [[7, 8, 9]]):
            found = []
            for share in (True, False):
                loaded = tiny_model()
                reader = AnchorReader(loaded.model, pad_id=0, share=share)
                chances = reader.chances([TokenisedAnchor(prompt, []) for prompt in prompts], openings)
                odds(chances).sum().backward()
                found.append((chances.detach(), [p.grad.clone() for p in loaded.model.parameters()]))
            torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
            for one, other in zip(found[0][1], found[1][1], strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_openings_are_the_frequent_ones_and_none_begins_another() -> None:
    loaded = tiny_model()
    pools = pools_with(loaded, [[9, 8, 7, 6]] * 30 + [[9, 8]] * 20 + [[4, 4, 4]] * 10 + [[5, 5, 5]])
    assert openings_of(pools) == [[9, 8, 7], [4, 4, 4]]
    many = [[token, 1, 2] for token in range(10) for _ in range(3)]
    assert openings_of(pools_with(loaded, many)) == []  # no four of ten cover half of the refusals
    few = [[token, 1, 2] for token in range(6) for _ in range(3)]
    assert len(openings_of(pools_with(loaded, few))) == MOST_OPENINGS
    assert openings_of({"answer": pools["answer"]}) == []


def test_without_openings_innocent_requests_are_held_by_their_words() -> None:
    loaded = tiny_model()
    pools = {"answer": build_pools(loaded, ANCHORS, 3)["answer"]}
    reader = reader_for(loaded, loaded.model)
    found = SENSORS["decision"].losses(reader, pools, {"answer": [0, 1]})["answer"]
    torch.testing.assert_close(found, SENSORS["words"].losses(reader, pools, {"answer": [0, 1]})["answer"])


def test_other_words_in_an_answer_are_no_drift_and_a_refusal_is() -> None:
    def drift_after(text: str, target: str) -> float:
        """Teach the tiny model to answer every innocent anchor with a text, then look."""
        loaded = tiny_model()
        guard = SafetyGuard(loaded, ANCHORS, KeelRule(rows=4, answer_rows=3, target=target))
        guard.prepare()
        taught = build_pools(loaded, SafetyAnchors(tuple(Anchor(one, "answer", text) for one in INNOCENT), "t"), 3)
        optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
        for _ in range(30):
            guard.reader.losses(taught["answer"].rows).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        step = guard._step()
        with torch.no_grad():
            return float(guard.rule._read(step, {"answer": 3})["answer"].excess)  # type: ignore[attr-defined]

    assert drift_after("yes nice cake", "words") > 0.5
    assert drift_after("yes nice cake", "decision") < 0.01
    assert drift_after("sorry i can't", "decision") > 0.5


def test_a_guard_prepared_for_decisions_begins_without_any_drift() -> None:
    guard = SafetyGuard(tiny_model(), ANCHORS, KeelRule(rows=4, answer_rows=3, target="decision"))
    guard.prepare()
    with torch.no_grad():
        found = guard.rule._read(guard._step(), {"refuse": 4, "answer": 3})  # type: ignore[attr-defined]
    assert all(float(drift.excess) < 1e-6 for drift in found.values())
