"""Rivals outside the step through ``trimtab sft``: trained, saved, and what was saved is the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_model
from tests.unit.tuning.test_sft import _config, place  # noqa: F401 - a fixture

from trimtab import models
from trimtab.errors import GuardError, UsageError
from trimtab.tuning import sft

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "up_proj"]}


def _base(place: Path) -> str:  # noqa: F811
    other = tiny_model(seed=1)
    other.model.save_pretrained(place / "base")
    other.tokenizer.save_pretrained(place / "base")
    return str(place / "base")


@pytest.mark.parametrize(
    ("guard", "lora"),
    [
        ("constrained", False),
        ("constrained", True),
        ("salora", True),
        ("safe-lora", True),
        ("resta", False),
        ("asft", True),
    ],
)
def test_trains_and_saves_what_it_holds(guard: str, lora: bool, place: Path) -> None:  # noqa: F811
    changes: dict[str, object] = {"guard": guard, "guard_anchors": None, "max_steps": 3, **(LORA if lora else {})}
    if guard in ("safe-lora", "resta", "asft"):
        changes["guard_base"] = _base(place)
    result = sft.run(_config(place, "out", **changes))  # verify_save compares logits with the reloaded model
    assert result.steps == 3 and result.guard == guard
    models.load(str(place / "out"))


def test_wrong_combinations_are_refused_before_training(place: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="takes no anchors"):
        sft.run(_config(place, "a", guard="resta"))
    with pytest.raises(UsageError, match="before its alignment"):
        sft.run(_config(place, "b", guard="resta", guard_anchors=None))
    with pytest.raises(GuardError, match="base weights"):
        sft.run(_config(place, "c", guard="resta", guard_anchors=None, guard_base=_base(place), **LORA))
    same = str(place / "model")
    with pytest.raises(GuardError, match="equals the aligned"):
        sft.run(_config(place, "d", guard="safe-lora", guard_anchors=None, guard_base=same, **LORA))
