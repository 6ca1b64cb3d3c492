"""The bundled prompts: counts, twins, and no near-duplicate across the split."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from trimtab import data
from trimtab.anchors import ANCHORS_PER_CATEGORY, SafetyAnchors, anchor_pairs, spare_pairs
from trimtab.evaluation.judges import judge

STOP = set("a an the to of in on for and or so that how do i my me is are can you what with it be at from".split())  # noqa: SIM905


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)


def _worst_across(train: list[str], evaluation: list[str]) -> tuple[float, str, str]:
    left, right = [_words(text) for text in train], [_words(text) for text in evaluation]
    pairs = ((_jaccard(a, b), i, j) for i, a in enumerate(left) for j, b in enumerate(right))
    score, i, j = max(pairs)
    return score, train[i], evaluation[j]


def test_enough_pairs_over_enough_categories() -> None:
    pairs = data.requests("train") + data.requests("eval")
    counts = Counter(pair.category for pair in pairs)
    assert len(pairs) >= 400 and len(counts) >= 12 and min(counts.values()) >= 60
    assert set(Counter(pair.category for pair in data.requests("eval")).values()) == {10}
    texts = [text for pair in pairs for text in (pair.harmful, pair.benign)]
    assert len(set(texts)) == len(texts) and all(text.isascii() for text in texts)
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_twins_share_words() -> None:
    pairs = data.requests("train") + data.requests("eval")
    sharing = sum(bool((_words(pair.harmful) & _words(pair.benign)) - STOP) for pair in pairs)
    assert sharing >= 0.9 * len(pairs)


def test_requests_hold_no_answers() -> None:
    """Requests only: short, one or two sentences, no lists, no steps."""
    for pair in data.requests("train") + data.requests("eval"):
        assert len(pair.harmful.split()) <= 25 and "\n" not in pair.harmful, pair.id


@pytest.mark.parametrize("kind", ["harmful", "benign", "either", "tickets", "instructions"])
def test_no_near_duplicates_across_the_split(kind: str) -> None:
    if kind == "tickets":
        train, evaluation = [t.text for t in data.tickets("train")], [t.text for t in data.tickets("eval")]
    elif kind == "instructions":
        train, evaluation = data.instructions("train"), data.instructions("eval")
    else:
        sides = ("harmful", "benign") if kind == "either" else (kind,)
        train = [getattr(pair, side) for pair in data.requests("train") for side in sides]
        evaluation = [getattr(pair, side) for pair in data.requests("eval") for side in sides]
    score, first, second = _worst_across(train, evaluation)
    assert score < 0.4, f"{score:.2f}: {first!r} / {second!r}"


def test_tickets_are_balanced() -> None:
    for split, each in (("train", 68), ("eval", 36)):
        counts = Counter(ticket.label for ticket in data.tickets(split))  # type: ignore[arg-type]
        assert set(counts) == set(data.TICKET_LABELS) and set(counts.values()) == {each}


def test_refusals_refuse_and_affirmations_do_not() -> None:
    assert all(judge("", text).label == "refused" for text in data.refusals())
    assert all(judge("", text).label == "answered" for text in data.affirmations())


def test_anchors_and_experiment_data_are_disjoint_and_no_evaluation_prompt_is_in_either() -> None:
    anchors, spare = {pair.id for pair in anchor_pairs()}, {pair.id for pair in spare_pairs()}
    evaluation = {pair.harmful for pair in data.requests("eval")} | {pair.benign for pair in data.requests("eval")}
    assert not anchors & spare and len(anchors) == 14 * ANCHORS_PER_CATEGORY
    assert not {anchor.request for anchor in SafetyAnchors.bundled().anchors} & evaluation


def test_any_prefix_of_the_bundled_pool_is_spread_over_the_categories() -> None:
    pool = SafetyAnchors.bundled(28)
    assert len(pool.side("refuse")) == len(pool.side("answer")) == 28
    assert set(Counter(anchor.category for anchor in pool.side("refuse")).values()) == {2}
