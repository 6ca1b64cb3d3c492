"""Errors of every published polynomial on a fine grid, as a table and as pictures.

    python benchmarks/polynomial_errors.py --out runs/polynomials

Writes `errors.json`, `errors.md` and one SVG for each exact function (the error of every source over the range, each
named in the picture); a few seconds, no model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import altair as alt
import torch
from torch import Tensor

from trimtab.approximation import polynomials as poly

Function = Callable[[Tensor], Tensor]
DRAWN = 801  # points of a curve, at most
CASES: dict[str, tuple[Function, tuple[float, float], dict[str, Function]]] = {
    "gelu": (
        torch.nn.functional.gelu,
        (-5.0, 5.0),
        {"Iron": poly.iron_gelu, "BOLT": poly.bolt_gelu, "BumbleBee": poly.bumblebee_gelu, "NEXUS": poly.nexus_gelu},
    ),
    "silu": (
        torch.nn.functional.silu,
        (-16.0, 16.0),
        {
            "Iron (sigmoid)": poly.iron_silu,
            "BOLT (sigmoid)": poly.bolt_silu,
            "BumbleBee": poly.bumblebee_silu,
            "PUMA": poly.puma_silu,
            "NEXUS (sigmoid)": poly.nexus_silu,
            "BOLT (refit, 2.7)": lambda x: poly.refit_silu(x, 4, 2.7, even=False),
            "BOLT (refit, 8)": lambda x: poly.refit_silu(x, 4, 8.0, even=False),
            "NEXUS (refit, 8)": lambda x: poly.refit_silu(x, 12, 8.0, even=True),
        },
    ),
    "tanh": (torch.tanh, (-5.0, 5.0), {"Iron": poly.iron_tanh, "BOLT": poly.bolt_tanh}),
    "exp": (
        torch.exp,
        (-14.0, 0.0),
        {
            "Iron": lambda x: poly.iron_exp_negative(-x),
            "BOLT": poly.bolt_exp,
            "BumbleBee (t=8)": poly.bumblebee_exp,
            "BumbleBee (t=5)": lambda x: poly.bumblebee_exp(x, 5),
            "NEXUS": poly.nexus_exp,
        },
    ),
}


def picture(name: str, low: float, high: float, curves: list[dict[str, object]]) -> alt.Chart:
    """Signed errors of one function's sources, with what was drawn in its title."""
    title = f"{name}(x) by each source less the exact {name}(x), x in [{low:g}, {high:g}]"
    chart = alt.Chart(alt.Data(values=curves), title=title).mark_line(strokeWidth=1.3)
    chart = chart.encode(
        x=alt.X("x:Q", scale=alt.Scale(domain=[low, high], nice=False)),
        y=alt.Y("error:Q", title=f"error of {name}"),
        color=alt.Color("source:N", title="source"),
    )
    return chart.properties(width=560, height=280)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=100_001, help="of the grid that errors are taken on (100001)")
    options = parser.parse_args()
    out, points = options.out, options.points
    if points < 2:
        parser.error(f"--points: a grid has at least 2, not {points}")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (exact, (low, high), functions) in CASES.items():
        fine = torch.linspace(low, high, points, dtype=torch.float64)
        coarse = torch.linspace(low, high, min(points, DRAWN), dtype=torch.float64)
        curves = []
        for source, function in functions.items():
            error = (function(fine) - exact(fine)).abs()
            place = int(error.argmax())
            rows.append(
                {"function": name, "source": source, "largest": float(error[place]), "at": float(fine[place]),
                 "mean": float(error.mean()), "low": low, "high": high}
            )  # fmt: skip
            signed = (function(coarse) - exact(coarse)).tolist()
            curves += [{"source": source, "x": x, "error": e} for x, e in zip(coarse.tolist(), signed, strict=True)]
        picture(name, low, high, curves).save(str(out / f"{name}.svg"))
    lines = ["| function | source | range | largest error | at | mean error |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['function']} | {r['source']} | [{r['low']:g}, {r['high']:g}] | {r['largest']:.5f} | {r['at']:.2f} | "
        f"{r['mean']:.5f} |"
        for r in rows
    ]
    (out / "errors.json").write_text(json.dumps(rows, indent=1))
    (out / "errors.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
