"""The pool that noise is cut from: the same values for a seed, copied to a device once, so many kept at most."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.approximation.noise import POOL, add_noise
from trimtab.approximation.technique import Rows

ROWS = Rows(positions=torch.tensor([[0, 1], [3, 4]]), ids=torch.tensor([[5, 9], [5, 2]]), draw=3)


@pytest.mark.parametrize(
    ("site", "seed", "first", "last"),
    [
        ("up", 0, [2.3027036, -1.5580781, -0.1144387], [0.8785838, -0.1893871, -0.6583345, 1.4246250]),
        ("up", 7, [-0.0539980, 1.6835374, 0.4585901], [-0.5686395, 0.1657482, -0.3297869, 0.2485885]),
        ("down", 0, [-1.8057139, 0.6702433, 0.2101317], [-1.4746630, 1.2085537, 0.0144399, -0.9948555]),
        ("down", 7, [-0.9100969, 0.2954966, -1.0686793], [-0.2732313, 1.4467945, -1.5959803, 0.2789541]),
    ],
)
def test_a_seed_means_the_values_that_it_always_meant(
    site: Any, seed: int, first: list[float], last: list[float]
) -> None:
    """Recorded before the pools of devices were kept."""
    drawn = add_noise(site, 1.0, seed, 2, ROWS)(torch.zeros(2, 2, 3)).flatten()
    torch.testing.assert_close(drawn[:3], torch.tensor(first), atol=2e-6, rtol=0)
    torch.testing.assert_close(drawn[-4:], torch.tensor(last), atol=2e-6, rtol=0)


class Copies(TorchDispatchMode):
    """Counts copies of whole pools."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].numel() == POOL:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_pool_is_copied_to_a_device_once() -> None:
    """The meta device stands in for an accelerator: what is there is another copy than the CPU's."""
    rows = Rows(*(part.to("meta") for part in (ROWS.positions, ROWS.ids)))  # type: ignore[union-attr]
    layers = [add_noise("up", 1.0, 11, layer, rows) for layer in range(3)]
    with Copies() as copies:
        for _ in range(4):
            for noisy in layers:
                assert noisy(torch.zeros(2, 2, 3, device="meta")).shape == (2, 2, 3)
    assert copies.count == 1


def test_pools_of_many_seeds_are_not_all_kept() -> None:
    """A search tries seed after seed; each pool has 16 MB."""
    for seed in range(100, 112):
        add_noise("up", 1.0, seed, 0, ROWS)(torch.zeros(2, 2, 3))
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == (POOL,)]
    assert len(alive) <= 8
