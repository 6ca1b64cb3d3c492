"""Looks: an answer that is cut off in an apology is finished before it is judged."""

from __future__ import annotations

import pytest
from tests.unit.patching import worlds

from trimtab.generation import Generation, GenerationSettings
from trimtab.patching import heldout

CUT = "I'm sorry for any confusion, but as a"
WHOLE = "I'm sorry for any confusion, but as a chatbot I can't help with that."


def test_only_undecided_answers_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"a": CUT, "b": "Sure, here is how to", "c": "I can't help with that, because", "d": CUT}
    ended = {"d"}  # the model's own end: nothing more will come
    asked: list[tuple[list[str], int]] = []

    def scripted(loaded: object, chats: list[list[dict[str, str]]], settings: GenerationSettings) -> list[Generation]:
        names = [chat[-1]["content"] for chat in chats]
        asked.append((names, settings.max_new_tokens))
        longer = settings.max_new_tokens > heldout.LOOK_TOKENS
        return [Generation(WHOLE if longer else first[name], 12, 3, name not in ended) for name in names]

    monkeypatch.setattr(heldout, "generate", scripted)
    chats = [[{"role": "user", "content": name}] for name in first]
    found = heldout.decided_answers(worlds.aligned(), chats, GenerationSettings(heldout.LOOK_TOKENS))
    assert found == [WHOLE, first["b"], first["c"], CUT]
    assert asked == [(["a", "b", "c", "d"], heldout.LOOK_TOKENS), (["a"], 32)]
    asked.clear()
    heldout.decided_answers(worlds.aligned(), chats, GenerationSettings(64))
    assert len(asked) == 1, "a long limit is the caller's own"
