"""Divergences from what the aligned model would say, against NumPy over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from trimtab.errors import UsageError
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.likely import divergences, joined, likely_of


def draws(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(aligned: torch.Tensor, other: torch.Tensor, used: torch.Tensor) -> np.ndarray:
    p, q = (log_softmax(part.double().numpy(), axis=-1) for part in (aligned, other))
    apart = (np.exp(p) * (p - q)).sum(-1)  # anchors x width
    return (apart * used.numpy()).sum(1) / used.numpy().sum(1)


USED = torch.tensor([[True, True, True], [False, True, True]])


def test_all_but_one_token_kept_is_the_whole_divergence() -> None:
    aligned, other = draws(0, 2, 3, 9), draws(1, 2, 3, 9)
    found = divergences(other, likely_of(aligned, USED, 8))
    np.testing.assert_allclose(found.numpy(), exact(aligned, other, USED), rtol=1e-5)


def test_joined_outcomes_never_overstate_and_vanish_only_at_the_aligned_model() -> None:
    aligned = draws(2, 2, 3, 50)
    likely = likely_of(aligned, USED, 4)
    for seed in range(20):
        other = aligned + 0.5 * draws(10 + seed, 2, 3, 50)
        found = divergences(other, likely).numpy()
        assert (found > 0).all()
        assert (found <= exact(aligned, other, USED) + 1e-6).all()
    np.testing.assert_allclose(divergences(aligned + 7.0, likely).numpy(), 0, atol=1e-6)  # a shift changes no chance


def test_anchors_of_different_width_can_be_joined_and_taken_apart() -> None:
    wide, narrow = draws(3, 2, 3, 20), draws(4, 1, 2, 20)
    likely = joined([likely_of(wide, USED, 5), likely_of(narrow, torch.ones(1, 2, dtype=torch.bool), 5)])
    other = draws(5, 1, 2, 20)
    alone = divergences(other, likely_of(narrow, torch.ones(1, 2, dtype=torch.bool), 5))
    torch.testing.assert_close(divergences(other, likely.of([2], 2)), alone)


def test_the_gradient_is_that_of_finite_differences() -> None:
    aligned = draws(6, 1, 2, 6).double()
    likely = likely_of(aligned, torch.ones(1, 2, dtype=torch.bool), 3)
    given = (aligned + 0.3 * draws(7, 1, 2, 6)).requires_grad_(True)
    divergences(given, likely).sum().backward()
    assert given.grad is not None
    for place in range(6):
        step = torch.zeros_like(given)
        step[0, 0, place] = 1e-2
        with torch.no_grad():
            slope = (divergences(given + step, likely) - divergences(given - step, likely)) / 2e-2
        assert float(slope) == pytest.approx(float(given.grad[0, 0, place]), abs=2e-3)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UsageError, match="no such target"):
        KeelRule(target="word")
