"""What a comparison concludes, as plain frozen records.

Covered: one record for each axis, pair, transition, finding and for the whole. Not covered: how they are computed
(``gate.py``) or shown (``reports/``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.comparison.differences import Difference
from trimtab.comparison.judge_error import Corrected, Powered
from trimtab.comparison.policy import Policy
from trimtab.comparison.records import Kind
from trimtab.comparison.statistics import Interval

#: By axis, by item id: people's values for base and candidate.
HumanLabels = Mapping[str, Mapping[str, tuple[float, float]]]
Verdict = Literal["pass", "regression", "unmeasured", "not enough evidence"]
Direction = Literal["worse", "better", "same", "unscored"]

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "regression": 3, "unmeasured": 4, "not enough evidence": 5}
_GRAVEST_FIRST: tuple[Verdict, ...] = ("regression", "unmeasured", "not enough evidence", "pass")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest of several verdicts: regression, unmeasured, not enough evidence, pass.

    No verdict at all is "unmeasured": nothing was looked at, which is never a pass.
    """
    return min(verdicts, key=_GRAVEST_FIRST.index, default="unmeasured")


@dataclass(frozen=True)
class Side:
    """One of the two runs, without its items: model as the user named it, ISO 8601 time, content hashes."""

    model: str
    created: str
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class Estimate:
    """Paired numbers of one axis, over the items that both runs scored.

    Attributes:
        pairs: number of items scored in both runs, > 0.
        base, candidate: rate in [0, 1] on a binary axis, mean on a continuous one.
        base_interval, candidate_interval: Wilson, or t.
        difference: candidate - base. difference_interval: Newcombe's paired interval, or t.
        worse_by, worse_interval: the same, turned so that positive is worse.
        p_value: exact McNemar, or paired t; two-sided, uncorrected. mid_p: mid-p McNemar, None if continuous.
        detectable: smallest difference that would have been found with the policy's power, at the policy's alpha
            divided by the number of measured axes (Holm's first step) and, on a binary axis, the observed share of
            flips; None where none could be found.
        pairs_needed: pairs at which a difference as large as the margin would be found likewise; None if continuous
            or out of reach.
        worse, better: items that changed for the worse or better (on a continuous axis: by more than the margin).
        clusters: number of independent observations, where answers belong together (several draws of one prompt,
            categories); the interval and the p-value are then those of ``clusters.py``. None where every item counts.
        corrected: the difference and its interval after correction for the judge's errors, turned so that positive is
            worse; None where no error rates were given. The verdict then rests on it.
        corrected_rates: corrected rate of base and candidate, with intervals; None likewise.
        powered: the difference by prediction-powered inference, turned likewise; None without human labels. The
            verdict then rests on it rather than on ``corrected``.
    """

    pairs: int
    base: float
    base_interval: Interval
    candidate: float
    candidate_interval: Interval
    difference: float
    difference_interval: Interval
    worse_by: float
    worse_interval: Interval
    p_value: float
    mid_p: float | None
    detectable: float | None
    pairs_needed: int | None
    worse: int
    better: int
    clusters: int | None = None
    corrected: Corrected | None = None
    corrected_rates: tuple[Corrected, Corrected] | None = None
    powered: Powered | None = None

    @property
    def deciding(self) -> tuple[float, Interval]:
        """How much worse the candidate is, with its interval: the best numbers that there are."""
        best = self.powered or self.corrected
        return (best.value, best.interval) if best is not None else (self.worse_by, self.worse_interval)


@dataclass(frozen=True)
class ItemPair:
    """One item in both runs; fields as in ``records.Item``, ``direction`` of the candidate against the base."""

    id: str
    category: str
    prompt: str
    base_answer: str
    candidate_answer: str
    base_verdict: str
    candidate_verdict: str
    base_value: float | None
    candidate_value: float | None
    direction: Direction

    @property
    def changed(self) -> bool:
        """Whether the item got worse or better, or lost or gained its score."""
        if self.direction == "unscored":
            return (self.base_value is None) != (self.candidate_value is None)
        return self.direction != "same"


@dataclass(frozen=True)
class Transition:
    """How many items of a category went from one of the judge's words to another."""

    base_verdict: str
    candidate_verdict: str
    category: str
    direction: Direction
    count: int


@dataclass(frozen=True)
class AxisResult:
    """The verdict on one axis and what it rests on.

    Attributes:
        name, label, kind, lower_is_better, judge, dataset: as in ``records.Axis``.
        verdict: see ``gate.py``.
        estimate: the numbers; None exactly when the verdict is "unmeasured".
        adjusted_p: Holm-adjusted over all measured axes; None if unmeasured.
        margin: how much worse is tolerated, in the axis' unit; None if unmeasured.
        unscored_base: items of the base without a score. unscored_candidate: paired items that lack one in the
            candidate.
        missing_in_base, missing_in_candidate: ids that only the other run has.
        pairs: every paired item, scored ones first.
        transitions: changed verdicts by category, most frequent first.
        notes: what a reader must know besides, as short clauses.
    """

    name: str
    label: str
    kind: Kind
    lower_is_better: bool
    judge: str
    dataset: str
    verdict: Verdict
    estimate: Estimate | None
    adjusted_p: float | None
    margin: float | None
    unscored_base: int
    unscored_candidate: int
    missing_in_base: tuple[str, ...]
    missing_in_candidate: tuple[str, ...]
    pairs: tuple[ItemPair, ...]
    transitions: tuple[Transition, ...]
    notes: tuple[str, ...]

    @property
    def changed_items(self) -> tuple[ItemPair, ...]:
        """The pairs that got worse or better, or lost or gained their score."""
        return tuple(pair for pair in self.pairs if pair.changed)


@dataclass(frozen=True)
class Finding:
    """Something beside the axes that a reader must weigh.

    Attributes:
        kind: "differs" (a fingerprint that should agree does not), "same weights", "not recorded" (a fingerprint that
            one side lacks), "not compared" (an axis that only the candidate has).
        key: the fingerprint key or axis name. base, candidate: its values.
        message: one clause for the reader; of settings that differ it names the keys or lines.
        differences: those keys or lines with both values; empty where only hashes are known.
    """

    kind: Literal["differs", "same weights", "not recorded", "not compared"]
    key: str
    base: str | None
    candidate: str | None
    message: str
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One candidate against one base: every axis, every finding, one verdict."""

    base: Side
    candidate: Side
    policy: Policy
    axes: tuple[AxisResult, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict

    @property
    def exit_code(self) -> int:
        """0 pass, 3 regression, 4 an axis unmeasured, 5 not enough evidence."""
        return EXIT_CODES[self.verdict]
