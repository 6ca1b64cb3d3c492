"""``keel``: a closed loop on both sides of safety, our default. The reasons are in ``docs/design/keel.md``.

Covered: looking at the anchors, closely or in passing; the correction; settling after the last update.
Not covered: the anchors and their references (``pools.py``), other rules (``rules.py``, ``rivals/``), a cadence that
skips steps (``patient.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.anchors import SafetyAnchors, Side
from trimtab.errors import GuardError, UsageError
from trimtab.gradients.direction import Direction, Target, gram_of, inner, joint_move, one_after_another, take_off
from trimtab.precision import at_least_float32
from trimtab.tuning.anchor_gradients import direction_of, watched
from trimtab.tuning.pools import AnchorPool, AnchorReader
from trimtab.tuning.rules import Report, Step
from trimtab.tuning.sensors import SENSORS, Chosen, Sensor


class Drift(NamedTuple):
    """Of one side's anchors: mean loss, and mean loss above their references where above (nats per decision token)."""

    loss: Tensor
    excess: Tensor


@dataclass
class KeelRule:
    """Closed loop on both sides, on the tokens where the decision falls.

    Each step looks at a few anchors of each side in rotation. The sensor of a side is how far its anchors have drifted
    above their own losses in the aligned model, ``h = mean_i max(0, l_i - ref_i)``. While no side is above ``margin``
    nothing is done. Otherwise, with ``H`` the sum over the sides that are, the task gradient loses its component
    against ``grad H``, if it has one, and the parameters take one Polyak step on ``H``: the shortest step that brings
    the linearised drift back to zero. The step does not pass through the optimizer, so the anchors leave no trace in
    its moments.

    After ``calm_after`` looks in a row with both sides at or below half the margin, the next ones are glances:
    ``calm_rows`` anchors a side, forward only. A glance above half the margin is followed by a whole look at once.

    Attributes:
        rows: refusals looked at in a step.
        answer_rows: answers looked at in a step.
        margin: drift that is tolerated (nats per decision token); below zero, every look acts.
        decision_tokens: first tokens of the reply that are watched.
        largest_shift: longest step, as a Euclidean norm.
        check_every: steps between two looks.
        calm_rows: anchors of each side in a glance.
        calm_after: calm looks in a row before glances suffice; 0 begins with glances.
        settle_rounds: most looks after the last update. Where they end without calm, every correction having undone a
            part of the one before, the parameters become their mean over the second half of the rounds (Polyak and
            Juditsky 1992), which takes one copy of what is trained.
        settle_calm: looks in a row without a correction that end them; one look at a few anchors is little evidence.
        settle_rows: anchors of each side in such a look.
        target: what is held (``sensors.py``). "distribution": the aligned model's whole choice at its own first tokens
            (KL from it, ``ref_i`` 0), which does not let a side become surer than it was. "words": these tokens.
            "decision": refusals by the aligned model's own first tokens, innocent
            requests by ``log(P / (1 - P)) / 3`` with ``P`` the chance that the reply opens like one of its refusals
            (nats; other words in an answer are no drift).
        spare: where one side only has drifted, the move is the shortest one that also does not raise the mean loss of
            the other side's anchors of this look, to first order; these are then read twice.
    """

    rows: int = 5
    answer_rows: int = 5
    margin: float = 0.02
    decision_tokens: int | None = 3
    largest_shift: float = 0.5
    check_every: int = 1
    calm_rows: int = 2
    calm_after: int = 8
    settle_rounds: int = 24
    settle_calm: int = 3
    settle_rows: int = 16
    target: str = "distribution"
    spare: bool = False
    name: str = "keel"

    def __post_init__(self) -> None:
        least = {"rows": 1, "answer_rows": 1, "check_every": 1, "calm_rows": 1, "calm_after": 0,
                 "settle_rounds": 0, "settle_calm": 1, "settle_rows": 1, "decision_tokens": 1}  # fmt: skip
        for option, bound in least.items():
            value = getattr(self, option)
            if value is not None and value < bound:
                raise UsageError(f"keel's {option} is at least {bound}", seen=value, fix="raise it")
        if self.target not in SENSORS:
            raise UsageError("keel knows no such target", seen=self.target, fix=f"one of: {', '.join(SENSORS)}")
        if not math.isfinite(self.margin):
            raise UsageError("keel's margin is a finite number", seen=self.margin, fix="give one, for example 0.05")
        if not self.largest_shift > 0:
            raise UsageError("keel's largest_shift is above 0", seen=self.largest_shift, fix="raise it")
        self._calm_looks = 0

    def prepare(self, reader: AnchorReader, pools: Mapping[Side, AnchorPool]) -> None:
        """Keep what is needed of the aligned model."""
        self.sensor.prepare(reader, pools)

    @property
    def sensor(self) -> Sensor:
        """What ``target`` names."""
        return SENSORS[self.target]

    def default_anchors(self) -> SafetyAnchors:
        return SafetyAnchors.bundled()

    def step(self, step: Step) -> Report:
        return self._watch(step) if step.index % self.check_every == 0 else Report()

    def finish(self, step: Step) -> list[Report]:
        reports: list[Report] = []
        summed: dict[str, Tensor] = {}
        while len(reports) < self.settle_rounds and not self._settled(reports):
            reports.append(self._hold(step, self.settle_rows, self.settle_rows))
            if len(reports) > self.settle_rounds // 2:
                add_to(summed, step.values)
        if summed and not self._settled(reports):
            place_mean(summed, step.values, len(reports) - self.settle_rounds // 2)
            step.moved()
            reports.append(
                self._seen(step, self.settle_rows, self.settle_rows)
            )  # the log ends with the model that is saved
        return reports

    def tensors(self) -> dict[str, Tensor]:
        """How calm it has been, for a resumed run."""
        return {"calm_looks": torch.tensor(self._calm_looks)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._calm_looks = int(tensors["calm_looks"])

    def _settled(self, reports: list[Report]) -> bool:
        last = reports[-self.settle_calm :]
        return len(last) == self.settle_calm and not any(report.acted for report in last)

    def is_calm(self, report: Report) -> bool:
        """Whether both sides are at or below half the margin."""
        return all(value <= self.margin / 2 for value in report.excess.values())

    def _watch(self, step: Step) -> Report:
        """A glance where it has been calm, a whole look otherwise and wherever the glance is not calm."""
        if self._calm_looks >= self.calm_after:
            report = self._seen(step, self.calm_rows, self.calm_rows)
            if self.is_calm(report):
                return report
        report = self._hold(step, self.rows, self.answer_rows)
        self._calm_looks = self._calm_looks + 1 if self.is_calm(report) else 0
        return report

    @torch.no_grad()
    def _seen(self, step: Step, refusals: int, answers: int) -> Report:
        """So many anchors of each side in one pass, without a correction."""
        counts = {"refuse": refusals, "answer": answers}
        return self._report(self._read(step, {side: counts[side] for side in step.pools}))

    def _hold(self, step: Step, refusals: int, answers: int) -> Report:
        """Look at both sides, correct if one has drifted.

        Each side is read in a pass of its own: a backward goes through its rows alone, and its graph is freed at once.
        """
        counts = {"refuse": refusals, "answer": answers}
        chosen = {side: step.pools[side].next_indices(counts[side]) for side in step.pools}
        drifts: dict[Side, Drift] = {}
        gradients: dict[Side, Direction] = {}
        for side, indices in chosen.items():
            with torch.enable_grad(), watched(step) as record:
                drifts |= self._read_these(step, {side: indices})
            if float(drifts[side].excess.detach()) > self.margin:
                gradients[side] = direction_of(drifts[side].excess, step, record)
            drifts[side] = Drift(*(value.detach() for value in drifts[side]))
        report = replace(self._report(drifts), acted=tuple(gradients))
        if not gradients:
            return report
        spared = self._rise_of_calm(step, {side: indices for side, indices in chosen.items() if side not in gradients})
        distances = [report.excess[side] for side in gradients]
        return self._correct(step, list(gradients.values()), distances, spared, report)

    def _rise_of_calm(self, step: Step, calm: Chosen) -> list[Direction]:
        """Where the mean loss of a side that has not drifted would rise: its gradient, read again."""
        found = []
        for side, indices in calm.items() if self.spare else ():
            with torch.enable_grad(), watched(step) as record:
                loss = self._read_these(step, {side: indices})[side].loss
            found.append(direction_of(loss, step, record))
        return found

    def _read(self, step: Step, counts: Mapping[Side, int]) -> dict[Side, Drift]:
        """The next anchors of each side, all in one forward pass."""
        return self._read_these(step, {side: step.pools[side].next_indices(count) for side, count in counts.items()})

    def _read_these(self, step: Step, chosen: Chosen) -> dict[Side, Drift]:
        with step.forward:
            losses = self.sensor.losses(step.reader, step.pools, chosen)
        found: dict[Side, Drift] = {}
        for side, part in losses.items():
            floor = self.sensor.floors(step.pools, side, chosen[side]).to(part.device)
            found[side] = Drift(part.mean(), (part - floor).clamp_min(0).mean())
        if not all(math.isfinite(float(drift.loss.detach())) for drift in found.values()):
            seen = {side: float(drift.loss.detach()) for side, drift in found.items()}
            raise GuardError("the anchor loss is not finite", seen=seen, fix="lower the learning rate")
        return found

    def _report(self, drifts: Mapping[Side, Drift]) -> Report:
        return Report(
            anchor_loss={side: float(drift.loss) for side, drift in drifts.items()},
            excess={side: float(drift.excess) for side, drift in drifts.items()},
        )

    def _correct(
        self,
        step: Step,
        anchors: Sequence[Direction],
        drifts: Sequence[float],
        spared: Sequence[Direction],
        report: Report,
    ) -> Report:
        directions, task = [*anchors, *spared], Direction(step.gradients)
        gram, along, squared = gram_of(directions), [inner(task, anchor) for anchor in anchors], inner(task, task)
        reached = {name for anchor in anchors for name, _ in anchor.blocks()}
        shared = gram if reached <= task.dense.keys() else gram_of([anchor.within(task.dense) for anchor in anchors])
        kept = one_after_another(squared, along, shared)
        move = joint_move(gram, [*drifts, *[0.0] * len(spared)], self.largest_shift)
        changed = [Target(task.dense, [*kept.scales, *[0.0] * len(spared)]), Target(step.values, move.multipliers)]
        take_off(changed, directions)
        step.moved()
        norm, longest = math.sqrt(squared), math.sqrt(float(gram.diagonal()[: len(anchors)].max()))
        return replace(
            report,
            conflict=min(along),
            cosine=min(along) / max(norm * longest, 1e-30),
            removed=math.sqrt(max(squared - kept.squared_norm, 0.0)) / max(norm, 1e-30),
            shift=move.length,
        )


@torch.no_grad()
def add_to(summed: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Add the parameters' present values, in float32 at least."""
    for name, parameter in parameters.items():
        value = at_least_float32(parameter.detach())
        summed[name] = summed[name] + value if name in summed else value.clone()


@torch.no_grad()
def place_mean(summed: Mapping[str, Tensor], parameters: Mapping[str, Tensor], count: int) -> None:
    """Give every parameter its mean over so many values."""
    for name, parameter in parameters.items():
        parameter.copy_(summed[name] / count)
