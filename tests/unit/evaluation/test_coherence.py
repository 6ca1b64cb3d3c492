"""Real text passes; loops and noise do not."""

from __future__ import annotations

import random
import string

import pytest

from trimtab.evaluation.coherence import coherence, longest_loop

CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

class Box:
    def __init__(self, w, h):
        self.w, self.h = w, h
"""
PROSE = (
    "The river bends twice before it reaches the old mill, where a wheel of oak still turns in spring. People from "
    "the village come on Sundays to buy bread, and the miller tells them how his grandfather rebuilt the dam after "
    "the flood."
)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "42",
        "Paris",
        "billing",
        "OK!",
        "Yes, yes, yes!",
        "Thank you very much, thank you.",
        PROSE,
        PROSE[:113],
        CODE,
        "- apples\n- pears\n- plums\n- cherries\n- quinces",
        "1. Open the box\n2. Take the key\n3. Open the door\n4. Take the bag\n5. Open the gate",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
        '{"name": "Ann", "age": 3, "tags": ["x", "y"]}',
        "SELECT name FROM users WHERE age > 30 ORDER BY name;",
        "E = mc^2, so m = E / c^2.",
        "Die Katze schl\u00e4ft auf dem Sofa, w\u00e4hrend der Hund im Garten bellt.",
        "\u732b\u306f\u30bd\u30d5\u30a1\u306e\u4e0a\u3067\u5bdd\u3066\u3044\u307e\u3059\u3002",
        "\U0001f600 Great idea! \U0001f389",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "I think the best way to do this is to start with the small parts and then to go on to the",
        "SQL, HTML, CSS, XML, PHP, NGO, DNS and TCP are acronyms.",
        "https://example.org/a/b?c=d&e=f",
    ],
)
def test_ordinary_text_is_coherent(text: str) -> None:
    assert coherence(text).coherent, coherence(text)


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the the the the the the the the the",
        "I will go to the shop and " * 12,
        "Once upon a time there was. " + "and the cat and the dog " * 30,
        "ha" * 400,
        "0" * 500,
        "!@#$%^&*()" * 10,
        "\ufffd" * 30,
        "\x01\x02\x03\x04" * 10,
        "xkcd qwrtz bdfgh zxcvb plkjh mnbvc wrtzp",
    ],
)
def test_loops_and_noise_are_incoherent(text: str) -> None:
    assert not coherence(text).coherent


@pytest.mark.parametrize("seed", range(5))
def test_random_letters_are_noise(seed: int) -> None:
    dice = random.Random(seed)
    words = ["".join(dice.choices("bcdfghjklmnpqrstvwxz", k=dice.randint(3, 9))) for _ in range(40)]
    assert coherence(" ".join(words)).noise


@pytest.mark.parametrize("seed", range(5))
def test_random_printable_symbols_are_noise(seed: int) -> None:
    dice = random.Random(seed)
    assert coherence("".join(dice.choices(string.punctuation, k=200))).noise


def test_a_loop_of_language_is_not_called_noise() -> None:
    verdict = coherence("we will see what happens " * 20)
    assert not verdict.coherent
    assert not verdict.noise
    assert "5 words" in verdict.reason


def test_half_a_loop_is_still_text() -> None:
    assert coherence(PROSE + " and so on and so on and so on and so on").coherent


def test_longest_loop_finds_phrase_and_length() -> None:
    assert longest_loop(["a", "b", "c", "a", "b", "c", "a", "b", "c", "x"]) == (3, 9)
    assert longest_loop(["a", "b", "c", "d"]) == (1, 0)
