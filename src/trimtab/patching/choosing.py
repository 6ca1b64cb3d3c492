"""What a repair starts from: whether the base under an adapter is aligned, and which sample a selection takes.

Covered: the ancestor that is found rather than named, candidates written whole, the targets of a selection.
Not covered: the selections themselves (``select.py``), what is done with the sample (``methods.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from trimtab.anchors import Anchor
from trimtab.errors import GuardError, ModelError, UsageError
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, generate
from trimtab.models import LoadedModel
from trimtab.patching.adapters import Workbench
from trimtab.patching.climb import LadderSettings
from trimtab.patching.heldout import continuations, same_vocabulary
from trimtab.patching.select import Selection, Targets, bilevel, exhaustive
from trimtab.patching.texts import BUILT_IN, Material, NotAlignedError, as_chat, written_by
from trimtab.patching.undo import borrowed

CANDIDATES = 20  # of the pool, among which a selection chooses: each is read 24 times with gradient
WHOLE_TOKENS = 64  # a refusal that is longer than that is dropped: cut, it would teach to stop in mid-sentence
TARGETS = 8  # prompts of a kind in the upper objective
PROBES = 8  # bundled requests of a kind on which a base shows whether it is aligned

Say = Callable[[str], object]
Select = Literal["general", "bilevel", "exhaustive"]
Ancestor = LoadedModel | Literal["base"] | None


def base_if_aligned(loaded: LoadedModel, bundled: Material) -> tuple[Literal["base"] | None, list[str]]:
    """The base under a given adapter, where it refuses and answers the bundled requests as an aligned model does.

    ``bundled``: never the user's samples, of which one may be all there is.
    """
    if not is_peft(loaded.model):
        return None, []
    asked = (replace(anchor, reply=None) for anchor in bundled.refuse[:PROBES])
    probe = replace(bundled, refuse=tuple(asked), answer=bundled.answer[:PROBES], writer="bundled")
    model: Any = loaded.model
    try:
        with model.disable_adapter():
            written_by(loaded, probe)
    except NotAlignedError as error:
        return None, [f"the base under the adapter does not count as aligned: of the bundled requests it {error.seen}"]
    return "base", []


def selected(
    loaded: LoadedModel,
    material: Material,
    bundled: Material,
    ancestor: Ancestor,
    *,
    select: Select,
    ladder: LadderSettings,
    say: Say,
) -> Material:
    """The material with the chosen sample first, its reply whole; the model is left as it was.

    Raises:
        UsageError: without an ancestor. ModelError: one of another vocabulary. GuardError: no candidate is left.
    """
    if ancestor is None:
        raise UsageError("choosing a sample needs the aligned model", seen=select, fix="pass --aligned MODEL")
    if ancestor != "base" and not same_vocabulary(loaded, ancestor):
        fix = "name the model that it came from"
        raise ModelError("selection needs an ancestor with the same vocabulary", seen=ancestor.name, fix=fix)
    if len(material.refuse) > CANDIDATES:
        say(f"the selection is among the first {CANDIDATES} of {len(material.refuse)} refusals")
    with borrowed(loaded, rank=ladder.rank, alpha=ladder.alpha, seed=ladder.seed) as bench:
        pool, chosen = _chosen(bench, material, bundled, ancestor, select, say)
    say(f"selected by {select}: {pool[chosen.order[0]].category!r} "
        f"({chosen.passes} sample passes, {chosen.seconds:.0f} s)")  # fmt: skip
    sample = pool[chosen.order[0]]
    others = tuple(anchor for anchor in material.refuse if anchor.request != sample.request)
    return replace(material, refuse=(sample, *others))


def is_peft(model: Any) -> bool:
    """Whether the model is a base with adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _chosen(
    bench: Workbench, material: Material, bundled: Material, ancestor: Any, select: Select, say: Say
) -> tuple[list[Anchor], Selection]:
    harmful = [as_chat(material.system)(text) for text in _harmful(material, bundled)]
    if ancestor == "base":
        with bench.as_base() as base:
            pool = _candidates(base, material, say)
            harm = continuations(base, harmful)
    else:
        pool = _candidates(ancestor, material, say)
        harm = continuations(ancestor, harmful)
    with bench.as_given() as given:
        task = continuations(given, [*material.kept, *material.ordinary][:TARGETS])
    find = bilevel if select == "bilevel" else exhaustive
    return pool, find(bench, pool, Targets(harm, task), system=material.system)


def _harmful(material: Material, bundled: Material) -> list[str]:
    """Requests of the upper objective: of the training pools, for the held-out ones decide when to stop; not among the
    candidates, where there are others."""
    tried = [anchor.request for anchor in material.refuse[:CANDIDATES]]
    rest = [anchor.request for anchor in (*material.refuse[CANDIDATES:], *bundled.refuse)]
    return ([text for text in dict.fromkeys(rest) if text not in tried] or tried)[:TARGETS]


def _candidates(ancestor: LoadedModel, material: Material, say: Say) -> list[Anchor]:
    """The first of the pool with whole replies by the ancestor; a user's and the published ones keep theirs."""
    anchors = material.refuse[:CANDIDATES]
    chats = [as_chat(material.system)(anchor.request) for anchor in anchors]
    written = generate(ancestor, chats, GenerationSettings(max_new_tokens=WHOLE_TOKENS, batch_size=32))
    pool = []
    for anchor, answer in zip(anchors, written, strict=True):
        if anchor.reply is not None and (material.writer == "user" or anchor in BUILT_IN.values()):
            pool.append(anchor)
        elif not answer.truncated and judge(anchor.request, answer.text).label == "refused":
            pool.append(replace(anchor, reply=answer.text))
    if not pool:
        seen = f"{len(anchors)} candidates, by {ancestor.name}"
        fix = "give samples with replies: --sample FILE"
        raise GuardError("no candidate has a whole refusal", seen=seen, fix=fix)
    if len(pool) < len(anchors):
        say(
            f"{len(anchors) - len(pool)} candidates dropped: no refusal, or none that ends within {WHOLE_TOKENS} tokens"
        )
    return pool


def named_or_base(
    loaded: LoadedModel, aligned: LoadedModel | None, asked: str, bundled: Callable[[], Material]
) -> tuple[Ancestor, list[str]]:
    """The ancestor: the loaded one, else the base where ``asked`` is "auto" and it is aligned, else none."""
    if aligned is not None or asked != "auto":
        return aligned, []
    return base_if_aligned(loaded, bundled())
