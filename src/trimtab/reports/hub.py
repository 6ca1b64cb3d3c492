"""Results as the model hub shows them: a block for a model card, and ``.eval_results`` files.

Covered: a Markdown block between two markers that can be replaced in a README; one YAML file for each data set that has
an address on the hub. Not covered: uploading. Prompts and answers are in neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from trimtab.comparison.records import Axis, Run
from trimtab.comparison.results import Comparison
from trimtab.errors import DataError
from trimtab.reports.document import check_comparisons
from trimtab.reports.markdown import comparison_table, methods
from trimtab.reports.text import markdown_text
from trimtab.reports.wording import VERDICT_LABELS, candidate_headline

BEGIN, END = "<!-- trimtab:begin -->", "<!-- trimtab:end -->"


def model_card_block(comparisons: Sequence[Comparison]) -> str:
    """A section for a model card, between two markers.

    Raises:
        UsageError: for no comparison, or comparisons with different bases.
    """
    many = check_comparisons(comparisons)
    parts = [BEGIN, "## Safety and utility against the reference"]
    for one in many:
        names = f"{markdown_text(one.candidate.model)} against {markdown_text(one.base.model)}"
        parts += [
            f"**{VERDICT_LABELS[one.verdict]}.** {names}. {markdown_text(candidate_headline(one), 2000)}",
            comparison_table(one),
        ]
        parts += [f"- {markdown_text(finding.message)}" for finding in one.findings]
    parts += ["<details><summary>How it was measured</summary>", methods(many), "</details>", END]
    return "\n\n".join(parts) + "\n"


def with_block(card: str, block: str) -> str:
    """A model card with the block in it: in place of an earlier one, else at the end.

    Raises:
        DataError: where only one of the two markers is there, so that nothing can be replaced safely.
    """
    if card.count(BEGIN) != card.count(END) or card.count(BEGIN) > 1 or (BEGIN in card) != (END in card):
        raise DataError(
            "the model card has a broken trimtab block",
            seen=f"{card.count(BEGIN)} begin markers, {card.count(END)} end markers",
            fix="remove what is left of it",
        )
    if BEGIN not in card:
        return (card.rstrip() + "\n\n" if card.strip() else "") + block
    before, _, rest = card.partition(BEGIN)
    return before + block.rstrip("\n") + rest.partition(END)[2]


def eval_results(run: Run, hubs: Mapping[str, str]) -> dict[str, str]:
    """``.eval_results`` files of one run by file name: YAML text for each axis whose data set is on the hub.

    Args:
        run: the measurement. hubs: hub address by name of the data set ("advbench": "walledai/AdvBench").

    The value is in percent, as the hub's leaderboards show it; the notes say n, judge and direction.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for axis in run.axes.values():
        dataset = axis.name.partition(":")[2]
        values = [item.value for item in axis.items if item.value is not None]
        if dataset not in hubs or not values:
            continue
        entry = EvalResultEntry(
            dataset_id=hubs[dataset],
            task_id=axis.name.partition(":")[0],
            value=round((100.0 if axis.kind == "binary" else 1.0) * sum(values) / len(values), 4),
            dataset_revision=_revision(axis),
            date=run.created or None,
            notes=f"{axis.label}; n = {len(values)} of {len(axis.items)}; judge {axis.judge}; "
            f"{'lower' if axis.lower_is_better else 'higher'} is better",
        )
        name = f"trimtab-{axis.name.replace(':', '-').replace('/', '-')}.yaml"
        files[name] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=False)
    return files


def write_eval_results(run: Run, hubs: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files under ``folder/.eval_results``.

    Raises:
        DataError: where no axis of the run has a data set on the hub.
    """
    files = eval_results(run, hubs)
    if not files:
        raise DataError(
            "no axis of that run has a data set on the hub", seen=", ".join(run.axes), fix="measure, say, advbench"
        )
    target = folder / ".eval_results"
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files.items():
        partial = target / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(target / name)
        written.append(target / name)
    return written


def _revision(axis: Axis) -> str | None:
    """The hub commit in ``name@revision@sha256:...``; None where the prompts came from a file."""
    parts = axis.dataset.split("@")
    return parts[1] if len(parts) == 3 else None
