"""Flags of ``trimtab patch``: what is read, and what is refused because nothing would read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.patching.lowrank import PUBLISHED_RANK
from trimtab.patching.methods import PatchSettings
from trimtab.patching.options import settings_from
from trimtab.patching.texts import PUBLISHED_SHORT


def options(**changes: Any) -> PatchSettings:
    bare: dict[str, Any] = {
        "sample": None, "keep": None, "samples": None, "axes": (), "steps": None, "learning_rate": None, "step": None,
        "rank": None, "seed": 0,
    }  # fmt: skip
    return settings_from(**{**bare, **changes})


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"step": 1.0}, "--step"),
        ({"method": "published", "step": 1.0}, "--step"),
        ({"method": "low-rank", "steps": 3}, "--steps"),
        ({"method": "low-rank", "learning_rate": 1e-3}, "--learning-rate"),
        ({"method": "low-rank", "samples": "1"}, "--samples"),
        ({"method": "published", "samples": "1,6,84"}, "--samples"),
        ({"method": "published", "keep": Path("no-such-file")}, "--keep"),
        ({"method": "low-rank", "keep": Path("no-such-file")}, "--keep"),
        ({"method": "published", "full": True, "rank": 8}, "--rank"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} belongs to") as caught:
        options(**changes)
    assert caught.value.fix == f"drop {flag}"


def test_a_flag_is_read_by_the_method_that_it_belongs_to(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("route this\n")
    assert options(method="published", select="bilevel", keep=tmp_path / "keep.txt").keep
    assert options(method="low-rank", step=0.5).step == 0.5
    assert options(method="published", steps=3, learning_rate=1e-4).steps == 3
    assert options(samples="2,5").ladder.samples == (2, 5)


def test_rank_is_of_the_adapter_or_of_the_closed_form() -> None:
    plain, low, wide = options(), options(method="low-rank"), options(method="low-rank", rank=3)
    assert (plain.ladder.rank, plain.ladder.alpha) == (8, 16)
    assert low.rank == PUBLISHED_RANK and wide.rank == 3
    mine = options(method="published", rank=4)
    assert (mine.ladder.rank, mine.ladder.alpha) == (4, 8)


def test_a_built_in_name_is_a_built_in_sample() -> None:
    found = options(sample="general-short").samples
    assert found is not None and found.anchors == (PUBLISHED_SHORT,)
