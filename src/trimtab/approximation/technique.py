"""What every technique gives and gets: edits at sites, and what is known about the rows being read.

Covered: the records that pass between the techniques and ``apply.py``. Not covered: any technique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from trimtab.approximation.sites import LayerSites, Site

if TYPE_CHECKING:
    from trimtab.approximation.calibration import Calibration


class Edit(NamedTuple):
    """One function at one place.

    Attributes:
        layer, site: where.
        function: new values from old ones, same shape. At "softmax" it is the exponential of scores minus their
            maximum (all <= 0); at "activation" it gets the activation's input.
        linear: only for the site's n-th linear map; None for all of them at once.
    """

    layer: int
    site: Site
    function: Callable[[Tensor], Tensor]
    linear: int | None = None


@dataclass
class Rows:
    """The tokens of the forward pass under way; written before each pass.

    Attributes:
        positions: rows x width, 0-based position of each token among its row's real ones; None before the first pass.
        ids: rows x width, token ids; zeros where the model was given embeddings.
        real: rows x width, False where padding.
        selected: flat token numbers, where experts see only some of them.
        draw: which draw of the noise; training takes a new one each step.
        decoded: how many of the last columns are read one at a time when answers are written; 0 in a prompt. Training
            reads prompt and reply at once, and a technique that treats a prompt by itself must know where it ends.
    """

    positions: Tensor | None = None
    ids: Tensor | None = None
    real: Tensor | None = None
    selected: Tensor | None = None
    draw: int = 0
    decoded: int = 0


@dataclass(frozen=True)
class Subject:
    """The model that a technique is put on.

    Attributes:
        model: the Transformers model inside any adapter. layers: its sites. rows: see ``Rows``.
        calibration: activations to calibrate on, collected when first asked for.
    """

    model: Any
    layers: tuple[LayerSites, ...]
    rows: Rows
    calibration: Callable[[], Calibration]


class Layers(Protocol):
    """A set of layers: ``entries.LayerRange``, which knows this file and so is not known to it."""

    def __contains__(self, layer: object) -> bool: ...

    def meets(self, other: Any) -> bool: ...


class Technique(Protocol):
    """One parsed approximation."""

    @property
    def label(self) -> str:
        """The string that makes the same technique again, every default written out."""

    @property
    def layers(self) -> Layers:
        """The layers that it is put on, by index."""

    @property
    def whole_rows(self) -> bool:
        """Whether a row must be read at once (and not behind a prefix that rows share)."""

    def notes(self, subject: Subject) -> list[str]:
        """What a reader must know: the port in use, ranges, departures from the source."""

    def edits(self, subject: Subject) -> Sequence[Edit]:
        """The edits for this model.

        Raises:
            ApproximationError: where the model lacks what it needs.
        """
