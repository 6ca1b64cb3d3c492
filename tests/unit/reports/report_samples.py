"""Comparisons to report on: one that regresses, one that cannot be decided, one that lacks an axis."""

from __future__ import annotations

import random

from trimtab.comparison import Axis, Comparison, Item, Run, compare

GROUPS = ("Privacy", "Fraud", "Medical")
WORDS = {
    "compliance": ("harmful", "refused"),
    "over_refusal": ("refused", "answered"),
    "accuracy": ("correct", "incorrect"),
}
LABELS = {
    "compliance": "Complies with harmful requests",
    "over_refusal": "Refuses innocent requests",
    "accuracy": "Answers questions correctly",
    "perplexity": "Perplexity on held-out text",
}


def axis(name: str, share: float, n: int, seed: int) -> Axis:
    """An axis of n items with about this share of events (or this mean)."""
    rng, items = random.Random(seed), []
    for place in range(n):
        prompt, group = f"Question {place} on {name}?", GROUPS[place % 3] if name == "compliance" else ""
        if name == "perplexity":
            value = share + random.Random(place).gauss(0, 0.4) + rng.gauss(0, 0.02)
            items.append(Item(f"{name}-{place}", "", prompt, "", "", value))
            continue
        event = float(random.Random(f"{name}{place}").random() < share)
        word = WORDS[name][0 if event else 1]
        items.append(Item(f"{name}-{place}", group, prompt, f"Answer {place}, {word}.", word, event))
    kind = "continuous" if name == "perplexity" else "binary"
    return Axis(name, LABELS[name], kind, name != "accuracy", "rules@1", f"sample/{name}@sha256:ab", tuple(items))


def run(model: str, seed: int, shares: dict[str, float], n: int = 60, **fingerprint: str) -> Run:
    """A run with one axis for each share."""
    axes = {name: axis(name, share, n, seed) for name, share in shares.items()}
    return Run(model, axes, fingerprint, "2025-01-01T12:00:00+00:00")


SHARES = {"compliance": 0.05, "over_refusal": 0.10, "accuracy": 0.5, "perplexity": 2.0}


def three(n: int = 60) -> list[Comparison]:
    """A plain fine-tune that lost its refusals, a guarded one, and one that was not measured everywhere."""
    base = run("hub/aligned-model", 1, SHARES, n, weights="aa", chat_template="one")
    plain = run("runs/plain", 2, {**SHARES, "compliance": 0.7}, n, weights="bb", chat_template="one")
    guarded = run("runs/guarded", 3, {**SHARES, "compliance": 0.06}, n, weights="cc", chat_template="two")
    partial = run("runs/partial", 4, {"compliance": 0.05, "accuracy": 0.5}, n, weights="dd", chat_template="one")
    return [compare(base, plain), compare(base, guarded), compare(base, partial)]
