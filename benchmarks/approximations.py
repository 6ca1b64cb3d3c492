"""Sweeps of `trimtab vet` as one table: all harmful prompts pooled, all innocent ones pooled, before and after.

    trimtab vet demo --approx all --axis ... --out runs/vet
    trimtab vet 'demo?adapter=runs/hardened' --approx all --axis ... --out runs/vet-hardened
    python benchmarks/approximations.py runs/vet runs/vet-hardened

Prints Markdown and, with `--out FILE`, writes JSON. Rates with Wilson intervals; the rise in compliance with Newcombe's
interval for pairs and exact McNemar; perplexity as the ratio to the exact model's on the same windows (t). A prompt
that either model left unscored is dropped from the pair, and counted.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.comparison.records import Item, Run
from trimtab.comparison.statistics import (
    mcnemar_exact,
    mean_interval,
    newcombe_paired_interval,
    paired_table,
    wilson_interval,
)
from trimtab.evaluation.judges import apologises
from trimtab.vetting.scrutiny import read_exact, read_vetted, sound

ALPHA = 0.05
Share = tuple[int, int, float, float]  # events, n, lower, upper


@dataclass(frozen=True)
class Line:
    """One model state: shares as (events, n, lower, upper), perplexity and its ratio to the exact model's."""

    name: str
    complies: Share
    complies_plainly: Share
    incoherent_harmful: Share
    refuses: Share
    incoherent_benign: Share
    rise: tuple[float, float, float] | None
    p_value: float | None
    unscored: int
    sound: tuple[int, int, float, float] | None
    perplexity: float | None
    ratio: tuple[float, float, float] | None
    cost: float | None
    errors: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of `trimtab vet`")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    found = {str(folder): lines_of(folder) for folder in given.folders}
    for name, lines in found.items():
        print(f"\n{name}\n")
        print(markdown(lines))
    if given.out:
        document = {name: [asdict(line) for line in lines] for name, lines in found.items()}
        given.out.write_text(json.dumps(document, indent=1))


def lines_of(folder: Path) -> list[Line]:
    """The exact model first, then every finished approximation in order of compliance."""
    exact = read_exact(folder / "exact")
    lines = [_line("none", exact, exact, {})]
    for path in sorted(folder.glob("*/approximation.json")):
        record = json.loads(path.read_text())
        if "failure" not in record:
            lines.append(_line(record["name"], read_vetted(path.parent, record), exact, record))
    return [lines[0], *sorted(lines[1:], key=lambda line: -line.complies[0] / max(1, line.complies[1]))]


def _line(name: str, run: Run, exact: Run, record: dict) -> Line:  # type: ignore[type-arg]
    harmful, benign = _items(run, "compliance"), _items(run, "over_refusal")
    base = _items(exact, "compliance")
    scored = [
        (base[key].value, item.value)
        for key, item in harmful.items()
        if key in base and item.value is not None and base[key].value is not None
    ]
    rise = p_value = None
    if run is not exact and scored:
        table = paired_table([before or 0.0 for before, _ in scored], [after or 0.0 for _, after in scored])
        low, high = newcombe_paired_interval(table, ALPHA)
        rise = ((table.candidate_only - table.base_only) / table.pairs, low, high)
        p_value = mcnemar_exact(table.base_only, table.candidate_only)
    perplexity, ratio = _perplexity(run, exact)
    pooled = {entry["site"]: entry for entry in record.get("errors", {}).get("local", []) if entry["layer"] == -1}
    return Line(
        name=name,
        complies=_share(harmful, "event"),
        complies_plainly=_share(harmful, "plain"),
        incoherent_harmful=_share(harmful, "incoherent"),
        refuses=_share(benign, "event"),
        incoherent_benign=_share(benign, "incoherent"),
        rise=rise,
        p_value=p_value,
        sound=_sound(harmful, record),
        unscored=sum(item.value is None for item in [*harmful.values(), *benign.values()]),
        perplexity=perplexity,
        ratio=ratio,
        cost=record["speed"]["cost"] if record else None,
        errors={site: _error(entry) for site, entry in pooled.items()},
    )


def _items(run: Run, family: str) -> dict[tuple[str, str], Item]:
    """All items of all axes of a kind, by axis and id."""
    chosen = [axis for name, axis in run.axes.items() if name.partition(":")[0] == family]
    return {(axis.name, item.id): item for axis in chosen for item in axis.items}


def _share(items: dict[tuple[str, str], Item], what: str) -> Share:
    if what == "incoherent":
        events, count = sum(item.verdict == "incoherent" for item in items.values()), len(items)
    elif what == "plain":  # counted as compliance, and no apology in front
        kept = [item for item in items.values() if item.value is not None]
        events, count = sum(item.value == 1.0 and not apologises(item.answer) for item in kept), len(kept)
    else:
        scored = [item.value for item in items.values() if item.value is not None]
        events, count = int(sum(scored)), len(scored)
    low, high = wilson_interval(events, count, ALPHA) if count else (0.0, 1.0)
    return events, count, low, high


def _sound(items: dict[tuple[str, str], Item], record: dict) -> Share | None:  # type: ignore[type-arg]
    """Counted as compliance, language, about the request, no apology in front; of all that were scored."""
    if "scrutiny" not in record:
        return None
    events, count = sum(map(sound, record["scrutiny"].values())), sum(one.value is not None for one in items.values())
    return events, count, *wilson_interval(events, count, ALPHA)


def _perplexity(run: Run, exact: Run) -> tuple[float | None, tuple[float, float, float] | None]:
    here, there = _items(run, "perplexity"), _items(exact, "perplexity")
    shared = [key for key in here if key in there and here[key].value is not None and there[key].value is not None]
    if len(shared) < 2:
        return None, None
    values = [float(here[key].value or 0.0) for key in shared]
    gaps = [value - float(there[key].value or 0.0) for value, key in zip(values, shared, strict=True)]
    mean = sum(gaps) / len(gaps)
    low, high = mean_interval(gaps, ALPHA)
    return math.exp(sum(values) / len(values)), (math.exp(mean), math.exp(low), math.exp(high))


def _error(entry: dict) -> str:  # type: ignore[type-arg]
    size = f"N {entry['std']:.2g}" if entry["shape"] == "Gaussian" else f"Lap {entry['laplace']:.2g}"
    return "0" if entry["shape"] == "none" else f"{size} ({entry['relative']:.0%})"


def markdown(lines: list[Line]) -> str:
    """The table."""
    head = (
        "approximation",
        "complies",
        "without an apology",
        "real answers",
        "incoherent",
        "rise, points",
        "p",
        "refuses innocents",
    )
    head += ("perplexity, ratio", "error up", "error down", "time")
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        rise = "" if line.rise is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * part for part in line.rise))
        ratio = "" if line.ratio is None else " × {:.3f} [{:.3f}, {:.3f}]".format(*line.ratio)
        perplexity = "–" if line.perplexity is None else f"{line.perplexity:.1f}"
        cells = [line.name, _text(line.complies), _text(line.complies_plainly)]
        cells += ["" if line.sound is None else _text(line.sound), str(line.incoherent_harmful[0]), rise]
        cells += ["" if line.p_value is None else f"{line.p_value:.2g}", _text(line.refuses)]
        cells += [perplexity + (ratio if line.rise is not None else "")]
        cells += [line.errors.get("up", "0"), line.errors.get("down", "0")]
        cells += ["1" if line.cost is None else f"{line.cost:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    sizes = f"n = {lines[0].complies[1]} harmful, {lines[0].refuses[1]} innocent prompts"
    return "\n".join([*rows, "", sizes])


def _text(share: Share) -> str:
    events, count, low, high = share
    return f"{100 * events / max(1, count):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
