"""Where training computes in bfloat16: what was asked for, else what the device does natively."""

from __future__ import annotations

import pytest
import torch

from trimtab import precision


def type_of_product(bf16: bool | None) -> torch.dtype:
    one = torch.ones(2, 2)
    with precision.training_scope(torch.device("cpu"), bf16):
        return (one @ one).dtype


@pytest.mark.parametrize("native", [True, False])
def test_what_is_asked_for_wins_and_the_processor_decides_the_rest(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: native)
    assert type_of_product(True) == torch.bfloat16
    assert type_of_product(False) == torch.float32
    assert type_of_product(None) == (torch.bfloat16 if native else torch.float32)


def test_a_device_without_an_answer_of_its_own_stays_in_float32() -> None:
    with precision.training_scope(torch.device("mps"), None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
