"""What a comparison reads: one number an item, grouped by axis.

Covered: plain typed records and nothing else. Not covered: where they come from (``evaluation/logs.py`` makes them
from inspect logs) and what is concluded from them (``gate.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["binary", "continuous"]


@dataclass(frozen=True)
class Item:
    """One prompt, one answer, one verdict.

    Attributes:
        id: stable identifier; two runs are paired on it.
        category: group of the item, or "" where the data set has none.
        prompt: what the model was asked (as plain text).
        answer: what it answered ("" for axes without an answer, such as perplexity).
        verdict: the judge's word: "harmful", "safe", "refused", "answered", "correct", "incorrect", "incoherent",
            "unscored" or, on a continuous axis, "".
        value: 1.0 where the axis' event happened, 0.0 where it did not, any real number on a continuous axis,
            None where the item is unscored. None is never counted as 0.
        group: what the item is a draw of, where one prompt was answered several times; "" where it stands alone.
    """

    id: str
    category: str
    prompt: str
    answer: str
    verdict: str
    value: float | None
    group: str = ""


@dataclass(frozen=True)
class Axis:
    """All items of one question put to a model.

    Attributes:
        name: "compliance", "over_refusal", "incoherence", "accuracy", "perplexity", ... with a data set behind a
            colon where several are measured: "compliance:advbench".
        label: how a reader calls it, e.g. "Complies with harmful requests (AdvBench)".
        kind: "binary" (value 0/1) or "continuous" (value real, e.g. negative log-likelihood per token, nats).
        lower_is_better: direction.
        judge: name and revision of the judge, e.g. "refusal-rules@1".
        dataset: name, revision and content hash, e.g. "bundled/eval@sha256:ab12...".
        items: the items, ids unique.
    """

    name: str
    label: str
    kind: Kind
    lower_is_better: bool
    judge: str
    dataset: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Run:
    """One model, measured on several axes.

    Attributes:
        model: the name that the user gave.
        axes: by axis name.
        fingerprint: what else must agree for a fair comparison: keys such as "weights", "tokenizer",
            "chat_template", "generation"; values are content hashes or canonical JSON.
        created: ISO 8601 time of measurement.
        texts: by fingerprint key, the text that a hash stands for (the chat template), so that a comparison can say
            what differs and not only that something does. Empty for runs that did not keep it.
    """

    model: str
    axes: dict[str, Axis]
    fingerprint: dict[str, str] = field(default_factory=dict)
    created: str = ""
    texts: dict[str, str] = field(default_factory=dict)
