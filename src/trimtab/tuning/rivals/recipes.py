"""Rivals that act around training instead of in the step: on the data, the loss, the adapter, or the result.

Covered: one small class a method, with the four places where ``trimtab sft`` asks it. Not covered: the formulas.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.anchors import SafetyAnchors
from trimtab.errors import GuardError, UsageError
from trimtab.models import LoadedModel
from trimtab.tuning.distill import distill
from trimtab.tuning.guard import quiet
from trimtab.tuning.pools import reader_for, tokenise
from trimtab.tuning.rivals import constrained, posthoc, salora
from trimtab.tuning.rivals.alignment import alignment_deltas, base_state, lora_modules


class Recipe:
    """Nothing, at every place."""

    def data(self, dataset: Any, loaded: LoadedModel, seed: int) -> Any:  # noqa: ARG002
        """The training rows."""
        return dataset

    def trainer(self) -> type | None:
        """A trainer class in place of TRL's, or None."""
        return None

    def before(self, trainer: Any, loaded: LoadedModel) -> None:
        """After the trainer was built, before its first step."""

    def after(self, trainer: Any, loaded: LoadedModel) -> None:
        """After the last step, before saving."""


@dataclass
class SafeInstr(Recipe):
    """SafeInstr: safety instructions mixed into the training data.

    The source adds some hundred human- and model-written rows (about 3 % of its data); here the aligned model writes
    the refusals (their first 12 tokens), to the bundled harmful requests. ``share``: rows added, of the data's.
    """

    share: float = 0.03

    def data(self, dataset: Any, loaded: LoadedModel, seed: int) -> Any:
        from datasets import Dataset, concatenate_datasets

        wanted = max(1, round(self.share * len(dataset)))
        with quiet(loaded.model), torch.random.fork_rng():
            held = distill(loaded, SafetyAnchors.bundled())
        pairs = [(anchor.request, anchor.reply) for anchor in held.side("refuse")]
        draw = random.Random(seed)
        chosen = [draw.choice(pairs) for _ in range(wanted)]
        example = dataset[0]
        rows = [_as_row(example, loaded, request, str(reply)) for request, reply in chosen]
        return concatenate_datasets([dataset, Dataset.from_list(rows, features=dataset.features)]).shuffle(seed=seed)


@dataclass
class Constrained(Recipe):
    """Constrained SFT: TRL's trainer with a token-wise weighted loss."""

    def trainer(self) -> type:
        return constrained.trainer_class()

    def before(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002
        if trainer.args.packing:
            fix = "packing: false"
            raise UsageError("Constrained SFT weighs a token by its place in its own answer", seen="packing", fix=fix)
        if not hasattr(trainer.model, "disable_adapter"):
            require_whole(trainer, "constrained")
            trainer.aligned = copy.deepcopy(trainer.model).eval().requires_grad_(False)


@dataclass
class SaLora(Recipe):
    """SaLoRA: the adapter is kept off the layer's outputs on harmful requests. ``rank``: directions kept off."""

    rank: int = 10

    def before(self, trainer: Any, loaded: LoadedModel) -> None:
        require_whole(trainer, "salora")
        salora.require_lora(trainer.model)
        if trainer.args.save_strategy != "no" or trainer.args.resume_from_checkpoint:
            raise UsageError(
                "SaLoRA cannot be resumed here: checkpoints would hold B without C", fix="save_strategy: no"
            )
        model = trainer.model
        asked = SafetyAnchors(tuple(_with_reply(a.request) for a in SafetyAnchors.bundled(32).side("refuse")), "salora")
        rows = [tokenise(loaded, anchor, None, 1) for anchor in asked.anchors]
        reader = reader_for(loaded, model)
        with quiet(model), model.disable_adapter():
            features = salora.safety_features(model, reader, rows, self.rank)
        salora.constrain(model, features)
        trainer.optimizer = None  # built anew from the parametrised B

    def after(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002
        salora.fold(trainer.model)


@dataclass
class SafeLora(Recipe):
    """Safe LoRA after training: the ten modules whose update leaves the alignment direction most are projected."""

    base: str = ""
    number: int = 10
    projected: list[str] = field(default_factory=list)

    def before(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002 - a wrong base must not cost a run
        require_whole(trainer, "safe-lora")
        if not lora_modules(trainer.model):
            raise GuardError("Safe LoRA is defined for LoRA only", fix="add --use_peft, or choose another guard")
        self._deltas = alignment_deltas(lora_modules(trainer.model), self.base)

    def after(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002
        modules = {module.name: module for module in lora_modules(trainer.model)}
        factors = {name: (m.B.detach(), m.A.detach()) for name, m in modules.items()}
        found = posthoc.safe_lora(factors, self._deltas, number=self.number)
        with torch.no_grad():
            for name, B in found.chosen.items():
                modules[name].B.copy_(B)
        self.projected = list(found.chosen)


@dataclass
class Resta(Recipe):
    """RESTA after full fine-tuning: half of the alignment vector, thinned, is added back."""

    base: str = ""

    def before(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002 - a wrong base must not cost a run
        require_whole(trainer, "resta")
        if hasattr(trainer.model, "peft_config"):
            fix = "train without --use_peft, or merge the adapter first (trimtab convert)"
            raise GuardError("RESTA changes the base weights, an adapter cannot hold that", fix=fix)
        self._base = base_state(self.base)
        self._aligned: dict[str, Tensor] = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
        self._require_vector()

    def _require_vector(self) -> None:
        for name, weight in self._aligned.items():
            if name not in self._base or self._base[name].shape != weight.shape:
                raise GuardError(f"{self.base} has no weight {name} of this shape", seen=tuple(weight.shape))
        if all(torch.equal(self._base[name].to(weight), weight) for name, weight in self._aligned.items()):
            fix = "name the unaligned one"
            raise GuardError("the model before alignment equals the aligned one", seen=self.base, fix=fix)

    def after(self, trainer: Any, loaded: LoadedModel) -> None:  # noqa: ARG002
        tuned = dict(trainer.model.named_parameters())
        repaired = posthoc.resta({n: p.detach() for n, p in tuned.items()}, self._aligned, self._base)
        with torch.no_grad():
            for name, value in repaired.items():
                tuned[name].copy_(value)


RECIPES: dict[str, Any] = {
    "safeinstr": SafeInstr,
    "constrained": Constrained,
    "salora": SaLora,
    "safe-lora": SafeLora,
    "resta": Resta,
}


def require_whole(trainer: Any, guard: str) -> None:
    """Refuse, before training, what reads or writes whole weights where a process holds parts of them.

    Raises:
        GuardError: under FSDP or DeepSpeed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        how = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        fix = "train with DDP or on one device, or use another guard"
        raise GuardError("this guard needs the whole weights in every process", seen=f"{guard} under {how}", fix=fix)


def _with_reply(request: str) -> Any:
    from trimtab.anchors import Anchor

    return Anchor(request, "refuse", "I")  # a token to stop before: only the request is read


def _as_row(example: dict[str, Any], loaded: LoadedModel, request: str, reply: str) -> dict[str, Any]:
    """A refusal in the form of the other rows."""
    user, assistant = {"role": "user", "content": request}, {"role": "assistant", "content": reply}
    if "messages" in example:
        filled: dict[str, Any] = {"messages": [user, assistant]}
    elif "completion" in example and isinstance(example["prompt"], list):
        filled = {"prompt": [user], "completion": [assistant]}
    else:
        shown = str(loaded.tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True))
        end = str(loaded.tokenizer.eos_token)
        filled = {"prompt": shown, "completion": reply} if "completion" in example else {"text": shown + reply + end}
    return {key: filled.get(key) for key in example}
