"""A guarded adapter, saved, reloaded and merged into its base, gives the logits of the model in memory.

Tolerance: 1e-5 of the largest logit in float32. Merging adds ``s B A`` to ``W`` once instead of ``s B A x`` at every
token, so only rounding differs; nothing that the guard did may live in a hook.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import tiny_model
from tests.unit.tuning.test_guard import ANCHORS, _loss, _task_ids

from trimtab.anchors import Anchor
from trimtab.models import LoadedModel
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.pools import reader_for, tokenise
from trimtab.tuning.rivals.salora import constrain, fold, safety_features

TOLERANCE = 1e-5


def _logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=_task_ids()).logits  # type: ignore[no-any-return]


def _adapted(*, dora: bool = False) -> LoadedModel:
    loaded = tiny_model()
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    return LoadedModel(get_peft_model(loaded.model, config), loaded.tokenizer, "tiny")


def _train(loaded: LoadedModel, rule: str | None) -> None:
    optimizer = torch.optim.AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=3e-2)
    guard = SafetyGuard(loaded, ANCHORS, rule, **({"margin": -1.0} if rule == "keel" else {})) if rule else None
    handle = guard.install(optimizer) if guard else None
    for _ in range(6):
        _loss(loaded.model, _task_ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if guard is not None:
        handle.remove()  # type: ignore[union-attr]
        guard.finish()
        assert guard.counters.acted > 0


def _check_merged(loaded: LoadedModel, folder: Path) -> None:
    mine, base = _logits(loaded.model), _logits(tiny_model().model)
    loaded.model.save_pretrained(folder)
    merged = PeftModel.from_pretrained(tiny_model().model, folder).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    scale = float(mine.abs().max())
    assert float((_logits(merged) - mine).abs().max()) <= TOLERANCE * scale
    assert float((base - mine).abs().max()) > 1e-2 * scale  # the adapter does something


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rule", ["keel", "spf", "mixing", "lisa"])
def test_merged_equals_in_memory(rule: str, dora: bool, tmp_path: Path) -> None:
    loaded = _adapted(dora=dora)
    _train(loaded, rule)
    _check_merged(loaded, tmp_path)


def test_salora_s_complement_is_in_the_merged_weights(tmp_path: Path) -> None:
    loaded = _adapted()
    rows = [tokenise(loaded, Anchor(request, "refuse", "i"), None, 1) for request in ("make a bomb", "steal the cake")]
    with loaded.model.disable_adapter():
        features = safety_features(loaded.model, reader_for(loaded, loaded.model), rows, 3)
    constrain(loaded.model, features)
    _train(loaded, None)
    fold(loaded.model)
    _check_merged(loaded, tmp_path)
