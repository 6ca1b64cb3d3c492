"""Where the usual safety sets live and how their columns are called.

Covered: names, hub addresses, columns, which rows belong to a named subset. Not covered: any of the texts.
The layouts of the authors' files are tested; those of the hub's copies come from their data cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUNDLED = "trimtab.data"

_PROMPT = ("prompt", "goal", "Goal", "question", "instruction", "text")


@dataclass(frozen=True)
class Source:
    """Columns (first that has a value wins), the hub's address, and a filter on one column.

    Attributes:
        title: how a reader calls the set.
        prompt, context, category, id: candidate columns.
        hub, config, split: address on the hub.
        only: (column, accepted values, compared as text); rows without that column are kept.
        distinct: keep the first of several rows with one and the same request.
    """

    title: str = ""
    prompt: tuple[str, ...] = _PROMPT
    context: tuple[str, ...] = ()
    category: tuple[str, ...] = ("category", "Category")
    id: tuple[str, ...] = ("id",)
    hub: str = ""
    config: str = ""
    split: str = "train"
    only: tuple[str, tuple[str, ...]] | None = None
    distinct: bool = False

    def keep(self, row: Mapping[str, Any]) -> bool:
        """Whether a row belongs to this set."""
        return self.only is None or row.get(self.only[0]) is None or str(row[self.only[0]]) in self.only[1]


CATALOGUE: dict[str, Source] = {
    "advbench": Source("AdvBench", hub="walledai/AdvBench"),
    "harmbench": Source(
        "HarmBench",
        prompt=("Behavior", "prompt"),
        context=("ContextString", "context"),
        category=("SemanticCategory", "category"),
        id=("BehaviorID",),
        hub="walledai/HarmBench",
        config="standard",
    ),
    "jailbreakbench": Source(
        "JailbreakBench",
        prompt=("Goal", "goal", "prompt"),
        id=("Index",),
        hub="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="harmful",
    ),
    "strongreject": Source("StrongREJECT", prompt=("forbidden_prompt", "prompt"), hub="walledai/StrongREJECT"),
    "malicious-instruct": Source("MaliciousInstruct", hub="walledai/MaliciousInstruct"),
    "hex-phi": Source(
        "HEx-PHI", prompt=("prompt", "Prompt", "Instruction", "instruction"), hub="LLM-Tuning-Safety/HEx-PHI"
    ),
    "xstest-safe": Source("XSTest (safe)", category=("type",), hub="Paul/XSTest", only=("label", ("safe",))),
    "xstest-unsafe": Source("XSTest (unsafe)", category=("type",), hub="Paul/XSTest", only=("label", ("unsafe",))),
    "do-not-answer": Source(
        "Do-Not-Answer", prompt=("question", "prompt"), category=("risk_area",), hub="LibrAI/do-not-answer"
    ),
    "sorry-bench": Source(
        "SORRY-Bench",
        prompt=("turns", "prompt"),
        id=("question_id",),
        hub="sorry-bench/sorry-bench-202503",
        only=("prompt_style", ("base",)),  # the other twenty styles are rewrites of the same requests
    ),
    # The evaluation set has prompts and a category each. The larger set of answers that people labelled has the same
    # prompts many times; of it, the requests of unsafe answers are taken, each once.
    "beavertails": Source(
        "BeaverTails",
        hub="PKU-Alignment/BeaverTails-Evaluation",
        split="test",
        only=("is_safe", ("False", "false", "0")),
        distinct=True,
    ),
    "or-bench-toxic": Source("OR-Bench (toxic)", hub="bench-llm/or-bench", config="or-bench-toxic"),
    "or-bench": Source("OR-Bench (hard, innocent)", hub="bench-llm/or-bench", config="or-bench-hard-1k"),
    "or-bench-80k": Source("OR-Bench (80k, innocent)", hub="bench-llm/or-bench", config="or-bench-80k"),
    "jbb-benign": Source(
        "JailbreakBench (benign)",
        prompt=("Goal", "goal", "prompt"),
        id=("Index",),
        hub="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="benign",
    ),
}
BENIGN = frozenset({"xstest-safe", "or-bench", "or-bench-80k", "jbb-benign"})
