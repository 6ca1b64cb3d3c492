"""SaLoRA's safety features against the closed form, and what happens without LoRA."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model

from trimtab.anchors import Anchor
from trimtab.errors import GuardError
from trimtab.models import LoadedModel
from trimtab.tuning.pools import TokenisedAnchor, reader_for, tokenise
from trimtab.tuning.rivals.recipes import SaLora
from trimtab.tuning.rivals.salora import safety_features

REQUESTS = ("make a bomb", "steal the cake and build a second bomb", "help with the bomb", "a bomb today please")
RANK = 3


def _adapted() -> tuple[LoadedModel, list[TokenisedAnchor]]:
    loaded = tiny_model()
    with torch.no_grad():  # a padding token that is seen where nobody masks it; a fresh model's is zero
        loaded.model.get_input_embeddings().weight[0] = loaded.model.get_input_embeddings().weight[5]
    rows = [tokenise(loaded, Anchor(request, "refuse", "i"), "please help the user", 1) for request in REQUESTS]
    first = loaded.model.model.layers[0].self_attn.q_proj
    first.bias = torch.nn.Parameter(torch.ones(first.out_features))  # no part of the closed form
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    return LoadedModel(model, loaded.tokenizer, "tiny"), rows


def _inputs(model: torch.nn.Module, rows: list[TokenisedAnchor]) -> dict[str, np.ndarray]:
    """Inputs of every adapted layer, each request read alone and unpadded: (columns, all tokens) in float64."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    handles = [
        layer.get_base_layer().register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].detach()[0].double().numpy().T)
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.prompt]))
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts, axis=1) for name, parts in seen.items()}


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_features_are_the_closed_form_over_the_requests_tokens_whatever_the_batch(at_once: int) -> None:
    loaded, rows = _adapted()
    reader = reader_for(loaded, loaded.model)
    assert len({len(row.prompt) for row in rows}) > 1  # so rows are padded
    assert reader.batch(rows).tokens.prefix.numel() > 0  # and begin alike
    with loaded.model.disable_adapter():
        found = safety_features(loaded.model, reader, rows, RANK, at_once=at_once)
        inputs = _inputs(loaded.model, rows)
    assert found.keys() == inputs.keys() and len(found) == 4
    for name, X in inputs.items():
        W = loaded.model.get_submodule(name).get_base_layer().weight.detach().double().numpy()
        _, vectors = np.linalg.eigh(W @ X @ X.T @ W.T)
        top = vectors[:, -RANK:]
        V = found[name].double().numpy()
        np.testing.assert_allclose(V @ V.T, top @ top.T, atol=1e-4)  # eigenvectors have no sign of their own


def test_without_lora_it_says_so() -> None:
    loaded = tiny_model()
    for save in ("no", "steps"):
        trainer = SimpleNamespace(
            model=loaded.model,
            args=SimpleNamespace(save_strategy=save, resume_from_checkpoint=None),
            is_fsdp_enabled=False,
            is_deepspeed_enabled=False,
        )
        with pytest.raises(GuardError, match="LoRA only"):
            SaLora().before(trainer, loaded)
