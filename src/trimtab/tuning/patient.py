"""``keel-patient``: keel that looks less often while nothing moves.

Covered: an adaptive cadence around ``KeelRule``, which is unchanged. Not covered: cheaper looks (``--guard_rows``,
``--guard_answer_rows``) and a fixed cadence (``--guard_check_every``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.tuning.keel import KeelRule
from trimtab.tuning.rules import Report, Step


@dataclass
class PatientKeelRule(KeelRule):
    """After ``calm_looks`` looks in a row with both sides below half the margin, the pause between looks doubles.

    It grows to ``longest_pause`` steps and falls back to every step at the first look that is not calm. What it risks:
    a drift that begins in a pause is seen ``longest_pause - 1`` steps late. The mean cost of watching a calm run
    tends to 1 / ``longest_pause`` of keel's.
    """

    calm_looks: int = 4
    longest_pause: int = 8
    name: str = "keel-patient"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pause, self._calm, self._next = 1, 0, 0

    def step(self, step: Step) -> Report:
        if step.index < self._next:
            return Report()
        report = self._watch(step)
        calm = self.is_calm(report)
        self._calm = self._calm + 1 if calm else 0
        if not calm:
            self._pause = 1
        elif self._calm % self.calm_looks == 0:
            self._pause = min(2 * self._pause, self.longest_pause)
        self._next = step.index + self._pause
        return report

    def tensors(self) -> dict[str, Tensor]:
        """The cadence, for a resumed run."""
        return {**super().tensors(), "cadence": torch.tensor([self._pause, self._calm, self._next])}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._pause, self._calm, self._next = (int(value) for value in tensors["cadence"])
