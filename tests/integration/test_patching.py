"""The published repair on the real small model: refusal of the sample, low rank of its gradient, exact on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimtab import models
from trimtab.patching.adapters import attach, finish, require_effect
from trimtab.patching.lowrank import measured_rank, weight_gradient
from trimtab.patching.recover import one_shot
from trimtab.patching.save import probe, reload, write_adapter
from trimtab.patching.texts import PUBLISHED
from trimtab.tuning.pools import reader_for, tokenise

pytestmark = pytest.mark.integration


def test_one_shot_learns_its_sample_and_the_adapter_reloads_bit_for_bit(tmp_path: Path) -> None:
    loaded = models.load("demo-unaligned")
    bench = attach(loaded, rank=4, alpha=8)
    row = tokenise(loaded, PUBLISHED, None, None)
    gradient = weight_gradient(bench, lambda: reader_for(bench.loaded, bench.model).losses([row]).mean())
    rank = measured_rank(gradient)
    assert rank.energy[20] > 0.9 and rank.needed[0.9] <= 20, rank
    losses = one_shot(bench.loaded, PUBLISHED, steps=4, learning_rate=1e-3)
    assert losses[-1] < losses[0] - 0.5, losses
    assert require_effect(bench) > 0.1
    model = finish(bench)
    size = write_adapter(model, loaded.tokenizer, tmp_path, "demo-unaligned")
    assert size < 10_000_000
    again = reload(tmp_path, probe(replace(loaded, model=model)), exact=True)
    merged = probe(replace(again, model=again.model.merge_and_unload()))
    expected = probe(replace(loaded, model=model))
    assert float((merged - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.isfinite(merged).all()
