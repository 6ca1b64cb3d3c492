"""Options of the guard on the command line and in YAML, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.anchors import SafetyAnchors
from trimtab.errors import UsageError
from trimtab.tuning.callback import SafetyGuardCallback
from trimtab.tuning.rivals.catalogue import OPTIONS
from trimtab.tuning.rivals.recipes import RECIPES, Recipe
from trimtab.tuning.rule_names import make_rule

NO_GUARD = "none"
#: Options by guard, without the prefix ``guard_``.
RULE_OPTIONS: dict[str, tuple[str, ...]] = {
    "keel": (
        "rows",
        "answer_rows",
        "margin",
        "decision_tokens",
        "check_every",
        "calm_rows",
        "calm_after",
        "settle_rounds",
        "settle_rows",
        "target",
        "spare",
    ),
    "keel-patient": (
        "rows",
        "answer_rows",
        "margin",
        "decision_tokens",
        "calm_rows",
        "calm_after",
        "settle_rounds",
        "settle_rows",
        "target",
        "spare",
        "calm_looks",
        "longest_pause",
    ),
    "spf": ("rank", "refresh_every", "rows", "clip_after"),
    "mixing": ("weight", "rows", "decision_tokens", "clip_after"),
    **OPTIONS,
}


@dataclass
class GuardArguments:
    """Options of the guard. None leaves the rule's own default."""

    guard: str = field(
        default="keel",
        metadata={"help": f"keel (default), spf (as published), mixing, none, or a rival: {', '.join(OPTIONS)}."},
    )
    guard_anchors: str | None = field(
        default=None, metadata={"help": "bundled, bundled:N (N a side), published, or a JSONL file."}
    )
    guard_rank: int | None = field(default=None, metadata={"help": "spf: singular directions per block (20)."})
    guard_refresh_every: int | None = field(default=None, metadata={"help": "spf: steps between safety gradients (1)."})
    guard_rows: int | None = field(default=None, metadata={"help": "Anchors looked at per step; keel: refusals (5)."})
    guard_answer_rows: int | None = field(default=None, metadata={"help": "keel: answers looked at per step (5)."})
    guard_margin: float | None = field(default=None, metadata={"help": "keel: tolerated drift, nats per token (0.02)."})
    guard_decision_tokens: int | None = field(
        default=None, metadata={"help": "Supervised first tokens of a reply (3)."}
    )
    guard_check_every: int | None = field(default=None, metadata={"help": "keel: steps between two looks (1)."})
    guard_calm_rows: int | None = field(
        default=None, metadata={"help": "keel: anchors a side in a glance while it is calm (2)."}
    )
    guard_calm_after: int | None = field(
        default=None, metadata={"help": "keel: calm looks in a row before glances suffice (8)."}
    )
    guard_settle_rounds: int | None = field(
        default=None, metadata={"help": "keel: most looks after the last update (24)."}
    )
    guard_settle_rows: int | None = field(
        default=None, metadata={"help": "keel: anchors of each side in such a look (16)."}
    )
    guard_target: str | None = field(
        default=None,
        metadata={"help": "keel: what is held of the aligned model: its distribution (default), words or decision."},
    )
    guard_spare: bool | None = field(
        default=None, metadata={"help": "keel: a correction of one side does not raise the calm side's loss (false)."}
    )
    guard_calm_looks: int | None = field(
        default=None, metadata={"help": "keel-patient: calm looks before the pause doubles (4)."}
    )
    guard_longest_pause: int | None = field(default=None, metadata={"help": "keel-patient: most steps of a pause (8)."})
    guard_clip_after: bool | None = field(
        default=None,
        metadata={"help": "Rules of the gradient: clip what the rule leaves (max_grad_norm), as published (false)."},
    )
    guard_weight: float | None = field(default=None, metadata={"help": "mixing: weight of the anchors' gradient (1)."})
    guard_base: str | None = field(
        default=None, metadata={"help": "asft, safe-lora, resta: the model before its alignment."}
    )
    guard_rho: float | None = field(default=None, metadata={"help": "safegrad, lisa: their rho (1)."})
    guard_align_steps: int | None = field(default=None, metadata={"help": "lisa: steps in the alignment state (100)."})
    guard_task_steps: int | None = field(default=None, metadata={"help": "lisa: steps in the task state (900)."})
    guard_share: float | None = field(default=None, metadata={"help": "safeinstr: rows added, share of the data."})
    verify_save: bool = field(default=True, metadata={"help": "Reload what was saved and compare its logits."})

    def options(self) -> dict[str, object]:
        """Options for the rule, checked against what it knows.

        Raises:
            UsageError: for an unknown rule, or an option that the rule does not have.
        """
        given = {
            name.removeprefix("guard_"): value
            for name, value in vars(self).items()
            if name.startswith("guard_") and name != "guard_anchors" and value is not None
        }
        if self.guard == NO_GUARD:
            known: tuple[str, ...] = ()
        elif self.guard in RULE_OPTIONS:
            known = RULE_OPTIONS[self.guard]
        else:
            raise UsageError(
                "unknown guard", seen=self.guard, fix=f"use one of: {', '.join([*RULE_OPTIONS, NO_GUARD])}"
            )
        if unknown := sorted(set(given) - set(known)):
            fix = f"it knows: {', '.join(f'--guard_{name}' for name in known) or 'none'}"
            raise UsageError(
                f"the guard {self.guard!r} has no option --guard_{unknown[0]}", seen=given[unknown[0]], fix=fix
            )
        return given

    def callback(self, name: str) -> SafetyGuardCallback | None:
        """The callback that these options describe; None for ``--guard none`` and for rivals outside the step."""
        options = self.options()
        if self.guard == NO_GUARD or self.guard in RECIPES:
            return None
        clip_after = bool(options.pop("clip_after", False))
        make_rule(self.guard, **options)  # what is wrong with an option is said before a model is loaded
        anchors = named_anchors(self.guard_anchors)
        return SafetyGuardCallback(anchors, self.guard, name=name, clip_after=clip_after, **options)

    def recipe(self) -> Recipe:
        """What is done around training: nothing, or a rival outside the step."""
        if self.guard not in RECIPES:
            return Recipe()
        if self.guard_anchors is not None:
            raise UsageError(f"the guard {self.guard!r} takes no anchors", seen=self.guard_anchors, fix="remove them")
        found: Recipe = RECIPES[self.guard](**self.options())
        return found


def named_anchors(name: str | None) -> SafetyAnchors | None:
    """``bundled``, ``bundled:N`` (N a side), ``published``, a JSONL path, or None for the rule's own default."""
    if name is None:
        return None
    if name == "published":
        return SafetyAnchors.published()
    kind, _, number = name.partition(":")
    if kind == "bundled" and (not number or number.isdecimal()):
        return SafetyAnchors.bundled(int(number) if number else None)
    return SafetyAnchors.from_jsonl(name)
