"""Rivals outside the step through ``trimtab sft``: trained, saved, and what was saved is the model in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.tiny import tiny_model
from tests.unit.tuning.test_sft import _config, place  # noqa: F401 - a fixture

from trimtab import models
from trimtab.errors import GuardError, UsageError
from trimtab.tuning import sft
from trimtab.tuning.rivals.recipes import RECIPES

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


@pytest.mark.parametrize("guard", ["resta", "safe-lora", "salora", "constrained"])
@pytest.mark.parametrize("how", ["FSDP", "DeepSpeed"])
def test_what_reads_whole_weights_is_refused_where_a_process_holds_parts(guard: str, how: str) -> None:
    """Before training: found out after it, the trained model would be lost."""
    loaded = tiny_model()
    trainer = SimpleNamespace(
        model=loaded.model,
        args=SimpleNamespace(packing=False),
        is_fsdp_enabled=how == "FSDP",
        is_deepspeed_enabled=how == "DeepSpeed",
    )
    with pytest.raises(GuardError, match=f"{guard} under {how}"):
        RECIPES[guard]().before(trainer, loaded)


def test_restas_base_is_checked_before_training(place: Path) -> None:  # noqa: F811
    """A base of another shape, or the aligned model itself, would change nothing and be saved as repaired."""
    same = str(place / "model")
    with pytest.raises(GuardError, match="equals the aligned"):
        sft.run(_config(place, "same", guard="resta", guard_anchors=None, guard_base=same))
    other = models.load(_base(place))
    other.model.resize_token_embeddings(other.model.config.vocab_size + 8)
    other.model.save_pretrained(place / "wider")
    other.tokenizer.save_pretrained(place / "wider")
    with pytest.raises(GuardError, match=r"no weight model\.embed_tokens\.weight of this shape"):
        sft.run(_config(place, "wider-out", guard="resta", guard_anchors=None, guard_base=str(place / "wider")))


def test_constrained_sft_refuses_packed_rows() -> None:
    loaded = tiny_model()
    trainer = SimpleNamespace(model=loaded.model, args=SimpleNamespace(packing=True))
    with pytest.raises(UsageError, match="packing"):
        RECIPES["constrained"]().before(trainer, loaded)
