"""Packed weights give the same products, leave no trace, and stay away from whatever is not a plain layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.packing import packed

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")


class Doubled(nn.Linear):
    """A subclass, as quantised and parallel layers are."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * super().forward(given)


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (16, 96), (3, 7, 96)])
def test_products_are_those_of_double_precision(shape: tuple[int, ...], bias: bool) -> None:
    plain = layer(bias)
    given = torch.randn(shape)
    exact = given.double().numpy() @ plain.weight.detach().double().numpy().T
    exact = exact + plain.bias.detach().double().numpy() if bias else exact
    with torch.inference_mode(), packed(plain, 16) as count:
        found = plain(given)
    assert count == 1
    assert found.shape == (*shape[:-1], 40)
    np.testing.assert_allclose(found.numpy(), exact, atol=2e-6)


@needs_onednn
def test_hooks_still_fire_and_nothing_remains() -> None:
    plain, seen = layer(), []
    given = torch.randn(4, 96)
    plain.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    plain.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    with torch.inference_mode():
        before = plain(given)
        with packed(nn.Sequential(plain), 4):
            torch.testing.assert_close(plain(given), before)
        after = plain(given)
    assert torch.equal(before, after)
    assert len(seen) == 3
    with pytest.raises(ZeroDivisionError), packed(plain, 4):
        raise ZeroDivisionError
    assert "forward" not in vars(plain)


@needs_onednn
def test_a_weight_changed_afterwards_counts_in_the_next_block() -> None:
    plain, given = layer(), torch.randn(4, 96)
    for _ in range(2):
        with torch.inference_mode(), packed(plain, 4):
            torch.testing.assert_close(plain(given), nn.functional.linear(given, plain.weight, plain.bias))
        plain.weight.data.mul_(-2)  # does not count as a change for autograd's version counter


def other_dtype() -> nn.Module:
    return layer().bfloat16()


def parametrised() -> nn.Module:
    plain = layer()
    parametrize.register_parametrization(plain, "weight", nn.Identity())
    return plain


def replaced() -> nn.Module:
    plain = layer()
    plain.forward = lambda given: given  # type: ignore[method-assign]
    return plain


@pytest.mark.parametrize("make", [other_dtype, parametrised, replaced, lambda: Doubled(96, 40), lambda: nn.ReLU()])
def test_only_plain_layers_are_packed(make: Callable[[], nn.Module]) -> None:
    model = make()
    own = vars(model).get("forward")
    with packed(model, 4) as count:
        assert count == 0
        assert vars(model).get("forward") is own
    assert vars(model).get("forward") is own


def test_a_model_that_fills_the_memory_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layer()
    room = 4 * plain.weight.nbytes
    for free, expected in ((room - 1, 0), (room, int(torch.backends.mkldnn.is_available()))):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        with packed(plain, 4) as count:
            assert count == expected


@needs_onednn
def test_autocast_keeps_its_own_dtype() -> None:
    plain, given = layer(), torch.randn(4, 96)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(given)
        with packed(plain, 4):
            assert torch.equal(plain(given), expected)
    assert expected.dtype == torch.bfloat16
