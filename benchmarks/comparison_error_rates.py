"""How often is the comparison wrong? Prints the tables of ``docs/results/statistics.md``.

    python benchmarks/comparison_error_rates.py [--comparisons 2000] [--json FILE] [--only NAME]

Every case draws so many comparisons from a known truth and applies the package's own functions. A share is printed with
its Monte-Carlo interval (Wilson, 99 %), and a bound counts as held where the bound is not below that interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from trimtab.comparison.clusters import bootstrap_interval, cluster_sums, sign_flip_p
from trimtab.comparison.judge_error import (
    JudgeErrors,
    corrected_difference,
    prediction_powered,
    rogan_gladen,
    youden_interval,
)
from trimtab.comparison.many import mcnemar_many, newcombe_many
from trimtab.comparison.planning import Assumptions, plan
from trimtab.comparison.statistics import PairedTable, holm, newcombe_paired_interval, wilson_interval

ALPHA, MARGIN = 0.05, 0.05
Cells = tuple[float, float, float, float]


class Case(NamedTuple):
    """One row: what was simulated, what was counted, the share, and the bound that it is held to."""

    group: str
    truth: str
    counted: str
    share: float
    draws: int
    bound: float
    at_most: bool

    @property
    def interval(self) -> tuple[float, float]:
        return tuple(wilson_interval(round(self.share * self.draws), self.draws, 0.01))  # type: ignore[return-value]

    @property
    def held(self) -> bool:
        """Within the bound, or not distinguishable from it."""
        low, high = self.interval
        return low <= self.bound if self.at_most else high >= self.bound


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def holm_rows(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjustment of each row; equal to the gate's (checked on the first row)."""
    order = np.argsort(p_values, axis=1)
    steps = np.take_along_axis(p_values, order, 1) * np.arange(p_values.shape[1], 0, -1)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, axis=1).clip(max=1.0), 1)
    if not np.allclose(adjusted[0], holm(p_values[0].tolist())):
        raise RuntimeError("the fast Holm is not the gate's")
    return adjusted


def gate_cases(draws: int) -> Iterator[Case]:
    """False alarms over several axes, false passes, coverage, exact against mid-p."""
    nulls: dict[str, Cells] = {
        "unchanged, 10 % flip, 7.5 % rate": (0.025, 0.05, 0.05, 0.875),
        "unchanged, 20 % flip, 50 % rate": (0.40, 0.10, 0.10, 0.40),
        "unchanged, 2 % flip, 2 % rate": (0.01, 0.01, 0.01, 0.97),
    }
    for seed, (name, cells) in enumerate(nulls.items()):
        for axes in (1, 4):
            for pairs in (50, 100, 400):
                tables = rng(100 + seed).multinomial(pairs, cells, size=(draws, axes))
                for test in ("exact", "mid-p"):
                    p_values = mcnemar_many(tables[..., 1], tables[..., 2], mid_p=test == "mid-p")
                    lower = newcombe_many(tables, ALPHA).lower
                    worse = (tables[..., 2] - tables[..., 1]) / pairs
                    alarms = np.any((lower > 0) & (holm_rows(p_values) < ALPHA) & (worse > MARGIN), axis=1)
                    truth = f"{name}; {axes} x {pairs}"
                    yield Case(f"gate, {test}", truth, "false alarm", alarms.mean(), draws, ALPHA, True)
                    rejected = np.any(holm_rows(p_values) < ALPHA, axis=1)
                    yield Case(f"test, {test}", truth, "p < alpha (two-sided)", rejected.mean(), draws, ALPHA, True)
                covered = newcombe_many(tables, ALPHA)
                inside = (covered.lower <= 0) & (covered.upper >= 0)
                if axes == 1:
                    yield Case("Newcombe", f"{name}; {pairs}", "covers the truth", inside.mean(), draws, 0.95, False)
    for pairs in (100, 400, 1000):
        for name, cells in {
            "worse by the margin, 11 % flip": (0.05, 0.03, 0.08, 0.84),
            "worse by the margin, only that": (0.02, 0.0, 0.05, 0.93),
            "worse by the margin, 25 % flip, 50 % rate": (0.35, 0.10, 0.15, 0.40),
        }.items():
            tables = rng(7).multinomial(pairs, cells, size=draws)
            found = newcombe_many(tables, ALPHA)
            truth = f"{name}; 1 x {pairs}"
            yield Case("gate", truth, "false pass", (found.upper <= MARGIN).mean(), draws, ALPHA / 2, True)
            inside = (found.lower <= 0.05) & (found.upper >= 0.05)
            yield Case("Newcombe", truth, "covers the truth", inside.mean(), draws, 0.95, False)


def plan_cases(draws: int) -> Iterator[Case]:
    """Power as planned: the number of pairs that ``plan`` asks for, in fresh simulations."""
    for number, assumed in enumerate(
        (
            Assumptions(margin=0.05, rate=0.1, flips=0.05),
            Assumptions(margin=0.05, rate=0.1, flips=0.05, axes=4),
            Assumptions(margin=0.03, rate=0.3, flips=0.10, axes=2),
            Assumptions(margin=0.10, rate=0.5, flips=0.20),
            Assumptions(margin=0.05, rate=0.05, flips=0.02, power=0.9),
        )
    ):
        found = plan(assumed)
        truth = f"margin {assumed.margin:g}, rate {assumed.rate:g}, flips {assumed.flips:g}, {assumed.axes} axes"
        half = assumed.flips / 2
        for what, pairs, worse in (("alarm", found.to_alarm, assumed.alarming), ("pass", found.to_pass, 0.0)):
            both = assumed.rate - half
            cells = (both, half, half + worse, 1 - both - 2 * half - worse)
            tables = rng(900 + number).multinomial(pairs, cells, size=draws)
            bounds = newcombe_many(tables, assumed.alpha)
            if what == "alarm":
                p_values = mcnemar_many(tables[:, 1], tables[:, 2])
                seen = (tables[:, 2] - tables[:, 1]) / pairs
                hits = (bounds.lower > 0) & (p_values < assumed.alpha / assumed.axes) & (seen > assumed.margin)
            else:
                hits = bounds.upper <= assumed.margin
            counted = f"{what} with the {pairs:,} planned"
            yield Case("plan", truth, counted, hits.mean(), draws, assumed.power, False)


def clustered_draws(generator: np.random.Generator, groups: int, size: int, flips: float, similar: float) -> tuple:
    """0/1 outcomes of both models: in a share ``similar`` of the clusters' flips, all go the same way."""
    base = generator.random((groups, size)) < 0.3
    flip = generator.random((groups, size)) < flips
    own = generator.random((groups, size)) < 0.5
    shared = np.repeat(generator.random((groups, 1)) < 0.5, size, axis=1)
    worse = np.where(generator.random((groups, size)) < similar, shared, own)
    candidate = np.where(flip, worse, base)
    base = np.where(flip, ~worse, base)
    return base, candidate


def cluster_cases(draws: int) -> Iterator[Case]:
    """Categories whose items move together: cluster bootstrap and sign flips against treating items as independent."""
    for groups, size, similar in ((8, 12, 0.8), (14, 10, 0.8), (30, 10, 0.8), (100, 4, 0.8), (14, 10, 0.0)):
        generator = rng(groups)
        labels = np.repeat(np.arange(groups), size).tolist()
        naive = covered = flipped = alarms = 0
        for _ in range(draws):
            base, candidate = clustered_draws(generator, groups, size, 0.3, similar)
            difference = (candidate.astype(float) - base.astype(float)).ravel()
            sums = cluster_sums(difference.tolist(), labels)
            table = np.array([[int(np.sum(base & candidate)), int(np.sum(base & ~candidate)),
                               int(np.sum(~base & candidate)), int(np.sum(~base & ~candidate))]])  # fmt: skip
            plain = newcombe_many(table, ALPHA)
            boot = bootstrap_interval(sums, ALPHA, resamples=1000)
            low, high = min(boot.lower, plain.lower[0]), max(boot.upper, plain.upper[0])
            p_value = sign_flip_p(sums, flips=2000)
            naive += bool(plain.lower[0] <= 0 <= plain.upper[0])
            covered += low <= 0 <= high
            flipped += p_value < ALPHA
            alarms += low > 0 and p_value < ALPHA and sums.mean > MARGIN
        truth = f"unchanged, {groups} clusters of {size}, similarity {similar:g}"
        yield Case("clusters ignored", truth, "Newcombe covers the truth", naive / draws, draws, 0.95, False)
        yield Case("clusters", truth, "cluster interval covers the truth", covered / draws, draws, 0.95, False)
        yield Case("clusters", truth, "sign-flip p < alpha", flipped / draws, draws, ALPHA, True)
        yield Case("clusters", truth, "false alarm", alarms / draws, draws, ALPHA, True)


def judge_cases(draws: int) -> Iterator[Case]:
    """A judge that errs: raw and corrected difference, corrected rate; error rates known from 200 labelled answers."""
    for number, (sensitivity, specificity, true) in enumerate(
        ((0.95, 0.95, 0.15), (0.85, 0.90, 0.15), (0.75, 0.95, 0.30), (0.95, 0.95, 0.0))
    ):
        generator, pairs, labelled = rng(300 + number), 400, 200
        raw = fixed = rate = alarm = 0
        used = 0
        for _ in range(draws):
            base = generator.random(pairs) < 0.2
            gone = generator.random(pairs)
            candidate = np.where(base, gone > 0.05, gone < 0.05 * 0.25 + true / 0.8)
            seen = [np.where(one, generator.random(pairs) < sensitivity, generator.random(pairs) > specificity)
                    for one in (base, candidate)]  # fmt: skip
            hits = int(generator.binomial(labelled // 2, sensitivity))
            keeps = int(generator.binomial(labelled // 2, specificity))
            errors = JudgeErrors("simulated", "event", hits, labelled // 2 - hits, keeps, labelled // 2 - keeps)
            table = PairedTable(
                int(np.sum(seen[0] & seen[1])), int(np.sum(seen[0] & ~seen[1])),
                int(np.sum(~seen[0] & seen[1])), int(np.sum(~seen[0] & ~seen[1])),
            )  # fmt: skip
            interval = newcombe_paired_interval(table, ALPHA)
            truth = 0.8 * (0.05 * 0.25 + true / 0.8) - 0.2 * 0.05
            raw += interval.lower <= truth <= interval.upper
            if youden_interval(errors, ALPHA).lower <= 0:
                continue
            used += 1
            corrected = corrected_difference((table.candidate_only - table.base_only) / pairs, interval, errors, ALPHA)
            fixed += corrected.interval.lower <= truth <= corrected.interval.upper
            p_value = float(mcnemar_many(np.array(table.base_only), np.array(table.candidate_only)))
            alarm += corrected.interval.lower > 0 and p_value < ALPHA and corrected.value > MARGIN
            mean = rogan_gladen(int(seen[0].sum()), pairs, errors, ALPHA).interval
            rate += mean.lower <= 0.2 <= mean.upper
        name = f"sensitivity {sensitivity:g}, specificity {specificity:g}, truly {true:+g}; 400 pairs"
        yield Case("judge errors ignored", name, "Newcombe covers the truth", raw / draws, draws, 0.95, False)
        yield Case("judge errors", name, "corrected interval covers", fixed / used, used, 0.95, False)
        yield Case("judge errors", name, "corrected rate covers", rate / used, used, 0.95, False)
        if true == 0.0:
            yield Case("judge errors", name, "false alarm", alarm / used, used, ALPHA, True)


def powered_cases(draws: int) -> Iterator[Case]:
    """A judge that errs more on one model than on the other: only labels of the very items help."""
    for labelled in (30, 100):
        generator = rng(labelled)
        covered = rates = 0
        for _ in range(draws):
            n = labelled + 400
            base, candidate = generator.random(n) < 0.2, generator.random(n) < 0.3
            seen = [np.where(generator.random(n) < miss, ~one, one) for one, miss in ((base, 0.05), (candidate, 0.25))]
            judged = (seen[1].astype(float) - seen[0]).tolist()
            truth = (candidate.astype(float) - base)[:labelled].tolist()
            found = prediction_powered(judged[labelled:], judged[:labelled], truth, ALPHA).interval
            covered += found.lower <= 0.1 <= found.upper
            naive = stats.t.interval(0.95, n - 1, np.mean(judged), stats.sem(judged))
            rates += naive[0] <= 0.1 <= naive[1]
        name = f"judge errs 5 % on base, 25 % on candidate; {labelled} labelled of {labelled + 400}"
        yield Case("uneven judge ignored", name, "interval of the judge covers", rates / draws, draws, 0.95, False)
        yield Case("prediction-powered", name, "interval covers the truth", covered / draws, draws, 0.95, False)


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
    "gate": gate_cases, "plan": plan_cases, "clusters": cluster_cases, "judge": judge_cases, "powered": powered_cases,
}  # fmt: skip


def line(case: Case) -> str:
    low, high = case.interval
    sign = "<=" if case.at_most else ">="
    held = "yes" if case.held else "**no**"
    shown = f"{100 * case.share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return f"| {case.group} | {case.truth} | {case.counted} | {shown} | {sign} {100 * case.bound:g} % | {held} |"


def main() -> int:
    """Print the table; exit code 1 where a bound that should hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=list(CASES))
    args = parser.parse_args()
    print("| method | truth | counted | share [99 % Monte-Carlo interval] | bound | held |")
    print("|---|---|---|---|---|---|")
    cases: list[Case] = []
    begun = time.perf_counter()
    for name, make in CASES.items():
        if args.only in (None, name):
            for case in make(args.comparisons):
                cases.append(case)
                print(line(case), flush=True)
    print(f"\n{len(cases)} cases of {args.comparisons:,} comparisons in {time.perf_counter() - begun:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([case._asdict() | {"held": case.held} for case in cases], indent=1))
    return int(any(not case.held for case in cases if "ignored" not in case.group))


if __name__ == "__main__":
    sys.exit(main())
