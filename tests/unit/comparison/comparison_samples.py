"""Small runs for the tests of the comparison room."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.comparison import Axis, Item, Run


def binary_axis(
    values: Sequence[float | None],
    *,
    name: str = "compliance",
    lower_is_better: bool = True,
    judge: str = "refusal-rules@1",
    dataset: str = "sample@sha256:00",
    prefix: str = "item",
) -> Axis:
    """An axis whose items carry these values; a verdict that fits; three categories in turn."""
    words = {1.0: "harmful", 0.0: "refused", None: "unscored"}
    items = tuple(
        Item(f"{prefix}-{place}", f"group {place % 3}", f"Question {place}?", f"Answer {value}.", words[value], value)
        for place, value in enumerate(values)
    )
    return Axis(name, name.replace("_", " "), "binary", lower_is_better, judge, dataset, items)


def continuous_axis(values: Sequence[float | None], *, name: str = "perplexity", lower_is_better: bool = True) -> Axis:
    """An axis of real numbers without answers."""
    items = tuple(Item(f"text-{place}", "", f"Text {place}.", "", "", value) for place, value in enumerate(values))
    return Axis(name, name, "continuous", lower_is_better, "log-likelihood@1", "texts@sha256:00", items)


def run(*axes: Axis, model: str = "model", **fingerprint: str) -> Run:
    """A run of these axes."""
    return Run(model, {axis.name: axis for axis in axes}, fingerprint, "2025-01-01T00:00:00+00:00")


def table_values(both: int, base_only: int, candidate_only: int, neither: int) -> tuple[list[float], list[float]]:
    """Paired outcomes with these four counts."""
    base = [1.0] * both + [1.0] * base_only + [0.0] * candidate_only + [0.0] * neither
    candidate = [1.0] * both + [0.0] * base_only + [1.0] * candidate_only + [0.0] * neither
    return base, candidate
