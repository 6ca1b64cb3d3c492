"""SafeInstr on the real small model: what is added to the data, and that nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset

from trimtab import data, load
from trimtab.anchors import SafetyAnchors
from trimtab.evaluation.judges import judge
from trimtab.tuning.rivals.recipes import SafeInstr

pytestmark = pytest.mark.integration


def test_a_share_of_refusals_is_added_and_every_row_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SafetyAnchors.bundled(8)
    monkeypatch.setattr(SafetyAnchors, "bundled", staticmethod(lambda *_: pool))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Message {number}"}],
            "completion": [{"role": "assistant", "content": "delivery"}],
        }
        for number in range(40)
    ]
    mixed = SafeInstr(share=0.1).data(Dataset.from_list(rows), load("demo"), seed=3).to_list()

    counted = Counter(row["prompt"][-1]["content"] for row in mixed)
    added = [row for row in mixed if not row["prompt"][-1]["content"].startswith("Message ")]
    assert len(mixed) == 44 and len(added) == 4
    assert all(counted[row["prompt"][-1]["content"]] == 1 for row in rows)  # nothing lost, nothing doubled
    harmful = {pair.harmful for pair in data.requests("train")}
    for row in added:
        assert row["prompt"][-1]["content"] in harmful
        assert judge("", row["completion"][-1]["content"]).label == "refused"
    assert mixed != SafeInstr(share=0.1).data(Dataset.from_list(rows), load("demo"), seed=4).to_list()
