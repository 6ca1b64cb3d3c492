"""A vet beside an earlier one of the same prompts: what hardening changed, technique by technique.

Covered: reading the earlier folder and refusing one that does not fit, before anything is measured; paired numbers for
each technique that both have. Axes of a kind are pooled: a row says one compliance, one over-refusal. Not covered: the
words (``before_words.py``); a verdict: that of a vet is about the approximations of one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.approximation import naming
from trimtab.comparison import compare
from trimtab.comparison.pairing import pair_axes
from trimtab.comparison.records import Run
from trimtab.comparison.statistics import (
    Interval,
    mean_interval,
    newcombe_paired_interval,
    paired_table,
    wilson_interval,
)
from trimtab.errors import DataError, TrimtabError, UsageError
from trimtab.evaluation.axes import with_limit
from trimtab.evaluation.logs import SUMMARY
from trimtab.vetting.scrutiny import INNOCENT_NOISE, NOISE_BY, read_exact, read_vetted, sound
from trimtab.vetting.sweep import EXACT, RECORD, SETTINGS, VetSettings, Vetted

_SETS = ("compliance", "over_refusal", "accuracy", "choice", "rouge", "perplexity")  # kinds whose prompts tell at once
_POOLED = ("compliance", "over_refusal", "incoherence", "perplexity")
Values = dict[tuple[str, str], float]


class Share(NamedTuple):
    """A share of scored answers."""

    events: int
    scored: int

    @property
    def rate(self) -> float:
        return self.events / self.scored

    @property
    def interval(self) -> Interval:
        """95 %, Wilson."""
        return wilson_interval(self.events, self.scored)


class Gap(NamedTuple):
    """A paired difference, after - before, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One technique (or "none") before and after. Each pair of numbers is over the prompts that both have scored; of
    compliance also those that both exact models have scored. None: not measured.

    Attributes:
        complies, refuses, incoherent: shares. refuses_gap: how over-refusal changed.
        rise: compliance less that of the same model exact. fall: how much smaller the rise is, a share of 1.
        real: answers counted as compliance that stand scrutiny, of all that are scored.
        nats: perplexity's mean loss. nats_gap: its paired change.
        others: means of every other axis, by name.
    """

    name: str
    complies: tuple[Share, Share] | None
    rise: tuple[float, float] | None
    fall: Gap | None
    real: tuple[Share, Share] | None
    refuses: tuple[Share, Share] | None
    refuses_gap: Gap | None
    incoherent: tuple[Share, Share] | None
    nats: tuple[float, float] | None
    nats_gap: Gap | None
    others: dict[str, tuple[float, float]]

    @property
    def smaller(self) -> float | None:
        """By which share of itself the rise fell; None where there was none."""
        return None if self.rise is None or self.rise[0] <= 0 else 1.0 - self.rise[1] / self.rise[0]


@dataclass(frozen=True)
class Changes:
    """The whole. ``only_before``, ``only_after``: techniques without a partner, with the reason where one failed.
    ``findings``: what else differs between the two exact models, as ``compare`` says it."""

    folder: Path
    models: tuple[str, str]
    exact: Change
    rows: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Before:
    """A finished vet, read back."""

    folder: Path
    exact: Run
    vetted: tuple[Vetted, ...]

    @property
    def names(self) -> list[str]:
        """What it measured."""
        return [one.name for one in self.vetted]


def read_before(folder: Path, settings: VetSettings, out: Path) -> Before:
    """The vet in ``folder``, if one with these settings can be compared with it.

    Raises:
        UsageError: no finished vet; the folder that is to be written; other prompts or another length of answers.
        DataError: files that cannot be read.
    """
    fix = "name the --out of a finished `trimtab vet`"
    if not (folder / SETTINGS).is_file():
        raise UsageError("that folder holds no vet to compare with", seen=folder, fix=fix)
    if not (folder / EXACT / SUMMARY).is_file():
        raise UsageError("the exact model was not measured to the end in that vet", seen=folder, fix=fix)
    if folder.resolve() == out.resolve():
        raise UsageError("the vet before is the one to be written", seen=folder, fix="name another --out")
    held = _json(folder / SETTINGS)
    exact = read_exact(folder / EXACT)
    _check_settings(folder, held, exact, settings)
    records = sorted(folder.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)  # in the order measured
    vetted = tuple(_vetted(path) for path in records if _is_finished(path))
    if not vetted:
        raise UsageError("no approximation was measured to the end in that vet", seen=folder, fix=fix)
    return Before(folder, exact, vetted)


def _check_settings(folder: Path, held: dict[str, Any], exact: Run, settings: VetSettings) -> None:
    """Prompts are told by their hashes, so that the same set from another path is the same set."""
    if held.get("max_new_tokens") != settings.max_new_tokens:
        raise UsageError(
            "the vet before let the models answer at another length",
            seen=f"{folder}: {held.get('max_new_tokens')} new tokens, now {settings.max_new_tokens}",
            fix=f"add --max-new-tokens {held.get('max_new_tokens')}",
        )
    if held.get("noise") != NOISE_BY:
        raise UsageError(
            "the vet before told noise in another way",
            seen=f"{folder}: an earlier version",
            fix="repeat that vet in another --out",
        )
    had = {axis.dataset for axis in exact.axes.values()}
    for spec in settings.axes:
        if spec.kind in _SETS and (label := with_limit(spec, settings.limit).prompts().label) not in had:
            same = [one.dataset for name, one in exact.axes.items() if name.partition(":")[0] == spec.kind]
            raise UsageError(
                f"the vet before asked other prompts of the axis {spec.kind}",
                seen=f"{folder}: {', '.join(same) or 'none'}; now {label}",
                fix="repeat its --axis, --limit, --perplexity and --accuracy",
            )


def _is_finished(path: Path) -> bool:
    return (path.parent / SUMMARY).is_file() or bool(_json(path).get("failure"))


def _vetted(path: Path) -> Vetted:
    record = _json(path)
    name, failure = str(record["name"]), str(record.get("failure") or "")
    return Vetted(name, path.parent, None if failure else read_vetted(path.parent, record), record, failure)


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("a file of the vet before cannot be read", seen=path, fix="vet that model again") from error
    return found


def make_changes(before: Before, base: Run, vetted: Sequence[Vetted]) -> Changes:
    """Pair an earlier vet with this one.

    Raises:
        DataError: where an axis of both asks other questions or has another judge.
    """
    for name in before.exact.axes.keys() & base.axes.keys():
        pair_axes(before.exact.axes[name], base.axes[name])
    earlier, later = ({_key(one.name): one for one in side} for side in (before.vetted, vetted))
    both = [key for key in later if key in earlier and earlier[key].run is not None and later[key].run is not None]
    rows = [_change(later[key].name, earlier[key], later[key], before.exact, base) for key in both]
    rows.sort(key=lambda row: -(row.rise or (0.0, 0.0))[0])
    return Changes(
        before.folder,
        (before.exact.model, base.model),
        _change("none", None, None, before.exact, base),
        tuple(rows),
        tuple(_lone(one, later.get(key)) for key, one in earlier.items() if key not in both and one.run is not None),
        tuple(_lone(one, earlier.get(key)) for key, one in later.items() if key not in both and one.run is not None),
        (*_findings(before.exact, base), *_unread_noise(before.vetted, vetted, base)),
    )


def _findings(old: Run, new: Run) -> tuple[str, ...]:
    """What else differs between the exact models; asked of pooled kinds, for others may want a margin of their own."""
    shared = [name for name in old.axes if name in new.axes and name.partition(":")[0] in _POOLED]
    if not shared:
        return ()
    first, second = (replace(run, axes={name: run.axes[name] for name in shared}) for run in (old, new))
    return tuple(finding.message for finding in compare(first, second).findings)


def _unread_noise(earlier: Sequence[Vetted], later: Sequence[Vetted], base: Run) -> tuple[str, ...]:
    """Where one vet's answers to innocent prompts were read for noise and the other's, of an old version, were not."""
    sides = [all(INNOCENT_NOISE in one.record for one in side if one.run is not None) for side in (earlier, later)]
    if sides[0] == sides[1] or not any(name.partition(":")[0] == "over_refusal" for name in base.axes):
        return ()
    which = "after" if sides[0] else "before"
    return (f"incoherent answers {which} lack the noise among answers to innocent prompts: an older version's vet",)


def _key(name: str) -> str:
    """The name with every default written out, so that "teal:0.5" meets "teal:share=0.5"."""
    try:
        return "+".join(technique.label for technique in naming.parse(name))
    except TrimtabError:  # of a version that knew another name
        return name


def _lone(one: Vetted, other: Vetted | None) -> str:
    return one.name + (f" (on the other side: {other.failure})" if other is not None and other.failure else "")


def _change(name: str, earlier: Vetted | None, later: Vetted | None, exact_before: Run, exact_after: Run) -> Change:
    """``earlier`` and ``later`` None: the exact models themselves."""
    old = earlier.run if earlier is not None and earlier.run is not None else exact_before
    new = later.run if later is not None and later.run is not None else exact_after
    sides = [_values(run, "compliance") for run in (old, new, exact_before, exact_after)]
    keys = [key for key in sides[0] if all(key in side for side in sides)]
    a, b, exact_a, exact_b = ([side[key] for key in keys] for side in sides)
    rises = [[x - y for x, y in zip(one, own, strict=True)] for one, own in ((a, exact_a), (b, exact_b))]
    falls = [x - y for x, y in zip(*rises, strict=True)]
    measured = bool(keys) and earlier is not None
    refuses, incoherent, nats = (_both(old, new, family) for family in ("over_refusal", "incoherence", "perplexity"))
    return Change(
        name=name,
        complies=_shares(a, b),
        rise=(_mean(rises[0]), _mean(rises[1])) if measured else None,
        fall=Gap(_mean(falls), *mean_interval(falls)) if measured else None,
        real=_real(earlier, later, len(_values(old, "compliance")), len(_values(new, "compliance"))),
        refuses=_shares(*refuses),
        refuses_gap=_share_gap(*refuses),
        incoherent=_shares(*incoherent),
        nats=(_mean(nats[0]), _mean(nats[1])) if nats[0] else None,
        nats_gap=_mean_gap(*nats),
        others=_others(old, new),
    )


def _values(run: Run, wanted: str) -> Values:
    """Scored items of one axis, or of all axes of a kind, by axis and id."""
    chosen = [axis for name, axis in run.axes.items() if wanted in (name, name.partition(":")[0])]
    return {(axis.name, item.id): item.value for axis in chosen for item in axis.items if item.value is not None}


def _both(old: Run, new: Run, wanted: str) -> tuple[list[float], list[float]]:
    before, after = _values(old, wanted), _values(new, wanted)
    keys = [key for key in before if key in after]
    return [before[key] for key in keys], [after[key] for key in keys]


def _others(old: Run, new: Run) -> dict[str, tuple[float, float]]:
    names = [name for name in old.axes if name.partition(":")[0] not in _POOLED and name in new.axes]
    pairs = {name: _both(old, new, name) for name in names}
    return {name: (_mean(before), _mean(after)) for name, (before, after) in pairs.items() if before}


def _real(earlier: Vetted | None, later: Vetted | None, before: int, after: int) -> tuple[Share, Share] | None:
    records = [one.record.get("scrutiny") if one is not None else None for one in (earlier, later)]
    if not all(records) or not before or not after:
        return None
    old, new = (sum(sound(axis) for axis in (record or {}).values()) for record in records)
    return Share(old, before), Share(new, after)


def _shares(before: Sequence[float], after: Sequence[float]) -> tuple[Share, Share] | None:
    return (Share(int(sum(before)), len(before)), Share(int(sum(after)), len(after))) if before else None


def _share_gap(before: Sequence[float], after: Sequence[float]) -> Gap | None:
    if not before:
        return None
    return Gap(_mean(after) - _mean(before), *newcombe_paired_interval(paired_table(before, after)))


def _mean_gap(before: Sequence[float], after: Sequence[float]) -> Gap | None:
    gaps = [new - old for old, new in zip(before, after, strict=True)]
    return Gap(_mean(gaps), *mean_interval(gaps)) if gaps else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
