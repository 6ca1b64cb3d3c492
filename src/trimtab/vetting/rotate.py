"""``trimtab harden --method rotate``: the model in other coordinates, as a whole model on disk.

Covered: loading, calibration rows, writing beside and moving into place, the check of what was written. Not covered:
the mathematics (``rotation.py``), training (``distill.py``, which takes the result as any other model).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from trimtab import models
from trimtab.approximation.calibration import default_rows
from trimtab.errors import ModelError
from trimtab.models import LoadedModel
from trimtab.patching.save import Scratch, dtype_of, probe, reload, write_model
from trimtab.vetting.adapters import check_start
from trimtab.vetting.rotation import rotate

ROWS = 24  # calibration rows


@dataclass(frozen=True)
class RotateSettings:
    """One run. ``seed``: of the bases."""

    model: str
    seed: int = 0


@dataclass(frozen=True)
class RotatedModel:
    """What came out.

    Attributes:
        folder: holds the model. size: bytes of its weights; untied: whether a second output matrix was made.
        gap: largest change of a logit on the calibration rows, as a share of the largest logit.
        error_before, error_after: of the down projections' outputs under 4 bits, root of the mean squared share of
            their length, over layers and tokens: in rotated coordinates without and with the scales.
    """

    folder: str
    size: int
    untied: bool
    gap: float
    error_before: float
    error_after: float
    seconds: float


def rotate_model(settings: RotateSettings, out: Path, *, loaded: LoadedModel | None = None) -> RotatedModel:
    """Write the rotated model to ``out``, which appears when it is whole; a model that is passed in is changed.

    Raises:
        UsageError: as ``check_start``; an output folder that is not empty.
        ModelError: for a model that cannot be rotated (``rotation.py`` says which).
        TrimtabError: where what was written is not what is in memory.
    """
    check_start(settings.model, out, loaded)
    begun = perf_counter()
    scratch = Scratch(out)
    try:
        loaded = loaded or models.load(settings.model)
        if getattr(loaded.model, "is_quantized", False):
            fix = "rotate the model before it is quantised"
            raise ModelError("quantised weights cannot be rotated", seen=settings.model, fix=fix)
        base_sha256 = models.content_hash(loaded.model, rounded=True)
        done = rotate(loaded.model, default_rows(loaded.tokenizer, ROWS), settings.seed)
        before, after = ((sum(part) / len(part)) ** 0.5 for part in zip(*done.errors, strict=True))
        size = write_model(loaded.model, loaded.tokenizer, scratch.path)
        how = {"dtype": str(dtype_of(loaded.model)).removeprefix("torch."), "device": str(loaded.device)}
        reload(scratch.path, probe(loaded), exact=True, made=loaded.model, **how)
        made = RotatedModel(str(out), size, done.untied, done.gap, before, after, perf_counter() - begun)
        record = {"base": loaded.name, "base_sha256": base_sha256, "harden": {"method": "rotate", **asdict(settings)}}
        (scratch.path / "trimtab.json").write_text(json.dumps(record | {"found": asdict(made)}, indent=1))
        scratch.accept()
    finally:
        scratch.drop()
    return made
