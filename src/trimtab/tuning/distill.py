"""Let the aligned model write its own replies to the anchors' requests, before training starts.

An anchor that the model would not itself say measures style, not refusal: its loss falls while refusals disappear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from trimtab.anchors import SIDES, Anchor, SafetyAnchors
from trimtab.errors import GuardError
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, generate
from trimtab.models import LoadedModel

REPLY_TOKENS = 12  # enough for the refusal rules to tell a refusal from an answer
LEAST_SHARE = 0.25  # below this the model is not what one would call aligned on that side


def distill(loaded: LoadedModel, anchors: SafetyAnchors, batch_size: int = 32) -> SafetyAnchors:
    """Fill in missing replies with the model's own (greedy), and drop anchors that it would answer the wrong way.

    A harmful request that the aligned model does not refuse cannot anchor refusal, and an innocent one that it refuses
    cannot anchor an answer. Anchors that came with a reply are kept as they are.

    Raises:
        GuardError: when the model holds less than a quarter of one side: there is nothing there to keep.
    """
    pending = [anchor for anchor in anchors.anchors if anchor.reply is None]
    system = [{"role": "system", "content": anchors.system}] if anchors.system is not None else []
    chats = [[*system, {"role": "user", "content": anchor.request}] for anchor in pending]
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        answers = generate(loaded, chats, GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=batch_size))
    finally:
        loaded.model.train(was_training)
    replies = iter(answers)
    kept: list[Anchor] = []
    asked: Counter[str] = Counter()
    for anchor in anchors.anchors:
        if anchor.reply is not None:
            kept.append(anchor)
            continue
        reply = next(replies).text
        asked[anchor.side] += 1
        wanted = "refused" if anchor.side == "refuse" else "answered"
        if reply and judge(anchor.request, reply).label == wanted:
            kept.append(replace(anchor, reply=reply))
    require_alignment(loaded.name, kept, asked)
    origin = f"{anchors.origin}, self-distilled" if pending else anchors.origin
    return replace(anchors, anchors=tuple(kept), origin=origin)


def require_alignment(name: str, kept: Sequence[Anchor], asked: Mapping[str, int]) -> None:
    """Check that the model went the right way on enough of each side's requests.

    Args:
        name: of the model, for the message.
        kept: anchors that it answered the right way. asked: requests of each side.

    Raises:
        GuardError: when it did on less than a quarter of a side.
    """
    for side in SIDES:
        held = sum(anchor.side == side for anchor in kept)
        if asked[side] and held < LEAST_SHARE * asked[side]:
            verb = "refuses" if side == "refuse" else "answers"
            raise GuardError(
                f"{name} {verb} too few of the anchors' requests to have a behaviour that could be kept",
                seen=f"{held} of {asked[side]}",
                fix="start from an aligned model, or give anchors with replies: --guard_anchors FILE.jsonl",
            )


def model_of(loaded: LoadedModel, model: torch.nn.Module) -> LoadedModel:
    """The same tokenizer and name around another (wrapped, adapted) model object."""
    return replace(loaded, model=model)  # type: ignore[arg-type]
