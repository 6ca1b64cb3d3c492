"""QuadA: preference training under the worst noise, so that refusals survive approximated activations.

The study trains under noise, as a stand-in for every approximation. Here the approximation that will be shipped can be
named instead (ours): the policy then trains under that (``derivatives.py``).

    loss = DPO(policy with noise in its sensitive layers, clean frozen reference)
           - lambda * mean cosine between first-layer activations of harmful prompts
       + imitation * negative log-likelihood of the preferred replies under noise        (ours, not in QuadA)

(arXiv 2502.00840, the formula of the project page; the authors' released code contains neither the noise nor the cosine
term, and lambda, the pooled token and the perturbed sites are published nowhere: see ``docs/design/approximation.md``.)

Covered: TRL's DPO trainer with a LoRA adapter, a reference precomputed with adapter and hooks off, ablations. With
lambda 0 and no noise the loss is TRL's own. Not covered: full fine-tuning, several GPUs (one process is required),
gradient accumulation and checkpointing (nothing turns them on), going on where a run was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from trimtab import models
from trimtab.approximation.apply import check_layers, install
from trimtab.approximation.calibration import collect, default_rows
from trimtab.approximation.naming import parse
from trimtab.approximation.noise import Noise
from trimtab.approximation.sites import base_of, find_sites
from trimtab.approximation.technique import Rows, Subject, Technique
from trimtab.errors import ModelError, UsageError
from trimtab.four_bits import keep_order
from trimtab.models import LoadedModel
from trimtab.vetting.adapters import Hardened, check_start, save
from trimtab.vetting.derivatives import trainable_edits
from trimtab.vetting.preferences import Preference, bundled, from_file


@dataclass(frozen=True)
class HardenSettings:
    """One hardening run.

    Attributes:
        noise: what the policy trains under: ``noise:...`` (published), any other approximation, or "none" (plain DPO).
        beta, learning_rate, steps, batch_size, rank: as TRL, PEFT.
        cosine: weight of the cosine term. imitation: weight of imitating the preferred replies.
        pairs: requests of the bundled set. two_sided: innocent twins too.
    """

    model: str
    noise: str
    data: str | None = None
    pairs: int = 160
    two_sided: bool = True
    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 2e-4
    beta: float = 0.1
    cosine: float = 0.01
    imitation: float = 0.0
    rank: int = 16
    seed: int = 0


def cosine_term(hidden: Tensor, last: Tensor, harmful: Tensor) -> Tensor:
    """Mean cosine over all pairs of different harmful prompts of a batch; 0 where there are fewer than two.

    Args:
        hidden: rows x width x channels, a layer's output. last: rows, index of each prompt's last token.
        harmful: rows, bool.
    """
    chosen = hidden[torch.arange(len(hidden), device=hidden.device), last][harmful].float()
    count = len(chosen)
    if count < 2:
        return hidden.sum() * 0.0
    unit = torch.nn.functional.normalize(chosen, dim=-1)
    total = unit.sum(0).square().sum() - unit.square().sum()  # sum over i != j of cos(h_i, h_j)
    return total / (count * (count - 1))


class HardeningTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer; noise lives in the model's hooks while it trains, the cosine term is added to the loss."""

    def prepare(self, rows: Rows, cosine: float) -> None:
        """Call once before ``train``: where to count steps, and the weight of the cosine term."""
        self.noise_rows, self.cosine = rows, cosine
        self._hidden: Tensor | None = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "harmful" not in self._signature_columns:
            self._signature_columns.append("harmful")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        harmful = inputs.pop("harmful")
        self.noise_rows.draw = self.state.global_step + 1 if self.model.training else 0
        if self.cosine == 0.0:
            return super()._compute_loss(model, inputs, return_outputs)
        first = find_first_layer(self.accelerator.unwrap_model(self.model))
        handle = first.register_forward_hook(self._keep)
        try:
            found = super()._compute_loss(model, inputs, return_outputs)
        finally:
            handle.remove()
        if self._hidden is None:
            raise ModelError("the first layer was not run, so the cosine term has nothing to read")
        count = len(harmful)
        last = inputs["completion_mask"][:count].argmax(1) - 1  # rows: chosen first, then rejected
        term = cosine_term(self._hidden[:count], last, harmful.to(self._hidden.device))
        self._hidden = None
        if return_outputs:
            return found[0] - self.cosine * term, found[1]
        return found - self.cosine * term

    def _keep(self, _: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        self._hidden = output[0] if isinstance(output, tuple) else output


def find_first_layer(model: Any) -> torch.nn.Module:
    """The decoder layer nearest the input."""
    from trimtab.approximation.sites import decoder_layers

    return decoder_layers(base_of(model))[0]


class _Collator:
    """TRL's preference collator with one more column."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.inner(examples)
        return {**batch, "harmful": torch.tensor([bool(example["harmful"]) for example in examples])}


def harden(settings: HardenSettings, out: Path, *, loaded: LoadedModel | None = None) -> Hardened:
    """Train an adapter that refuses under noise, and save it in ``out``.

    An interrupted run leaves what was in ``out`` and keeps no step of its own; it says so on standard error.

    Raises:
        UsageError: as ``check_start``, an unknown approximation, layers that the model does not have, a batch without
            pairs for the cosine term. DataError: as ``preferences``. ModelError: an adapter that does not reload to the
            same logits.
    """
    techniques: Sequence[Technique] = [] if settings.noise == "none" else parse(settings.noise)
    if settings.cosine and settings.batch_size < 2:
        raise UsageError("the cosine term needs two prompts in a batch", seen="batch size 1", fix="--batch-size 4")
    check_start(settings.model, out, loaded)
    try:
        return _harden(settings, techniques, out, loaded)
    except KeyboardInterrupt:
        kept = f"what was in {out} is as it was, and the command begins anew"
        print(f"harden: interrupted; quada keeps no steps: {kept}", file=sys.stderr)
        raise


def _harden(
    settings: HardenSettings, techniques: Sequence[Technique], out: Path, loaded: LoadedModel | None
) -> Hardened:
    given = from_file(Path(settings.data)) if settings.data else None
    loaded = loaded or models.load(settings.model)
    check_layers(techniques, find_sites(loaded.model))  # before the model writes its pairs
    _require_whole_rows(techniques, settings.noise)
    preferences = given or bundled(loaded, settings.pairs, two_sided=settings.two_sided, seed=settings.seed)
    base_sha256 = models.content_hash(loaded.model, rounded=True)
    trainer, rows = make_trainer(loaded, preferences, settings, out)
    keep_order(trainer.model)  # 4-bit weights that were repacked while the model answered would train wrong
    base = base_of(trainer.model)
    layers = find_sites(base)
    subject = Subject(base, layers, rows, lambda: collect(base, layers, default_rows(loaded.tokenizer)))
    undo = install(base, layers, trainable_edits(techniques, subject), rows)
    try:
        outcome = trainer.train()
    finally:
        undo()
    trainer.model.eval()
    record = {"base": loaded.name, "base_sha256": base_sha256, "harden": {"method": "quada", **asdict(settings)}}
    save(trainer.model, loaded, out, record)
    seconds = float(outcome.metrics.get("train_runtime", 0.0))
    return Hardened(str(out), len(preferences), int(trainer.state.global_step), float(outcome.training_loss), seconds)


def _require_whole_rows(techniques: Sequence[Technique], name: str) -> None:
    for technique in techniques:
        if getattr(technique, "prefill", 1.0) < 1.0:
            fix = f"--noise {name}{',' if ':' in name else ':'}prefill=1, or --method distill"
            raise UsageError(
                "quada reads prompt and reply as one row, and this would leave the first part of it exact",
                seen=technique.label,
                fix=fix,
            )


def noise_of(name: str) -> Noise | None:
    """The one noise that a name stands for; None where it is anything else."""
    found = [] if name == "none" else parse(name)
    return found[0] if len(found) == 1 and isinstance(found[0], Noise) else None


def make_trainer(
    loaded: LoadedModel, preferences: Sequence[Preference], settings: HardenSettings, out: Path
) -> tuple[HardeningTrainer, Rows]:
    """The trainer, its reference already computed (adapter off, no hooks), and the rows that key its noise."""
    from peft import LoraConfig

    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.prompt}],
                "chosen": [{"role": "assistant", "content": row.chosen}],
                "rejected": [{"role": "assistant", "content": row.rejected}],
                "harmful": row.harmful,
            }
            for row in preferences
        ]
    )
    config = DPOConfig(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.03 * settings.steps)),
        weight_decay=0.05,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        beta=settings.beta,
        loss_type=["sigmoid", "sft"] if settings.imitation else ["sigmoid"],
        loss_weights=[1.0, settings.imitation] if settings.imitation else None,
        precompute_ref_log_probs=True,
        seed=settings.seed,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=512,
        dataset_num_proc=None,
        use_cpu=loaded.device.type == "cpu",
    )
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    trainer = HardeningTrainer(
        model=loaded.model,
        args=config,
        train_dataset=dataset,
        processing_class=loaded.tokenizer,
        peft_config=lora,
    )
    rows = Rows()
    trainer.prepare(rows, settings.cosine)
    trainer.data_collator = _Collator(trainer.data_collator)
    return trainer, rows
