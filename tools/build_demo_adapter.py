"""Build the LoRA adapter that aligns the embedded demo model (``src/trimtab/data/demo_adapter``).

    python tools/build_demo_adapter.py --out src/trimtab/data/demo_adapter

Three kinds of rows, all from the ``train`` splits written for this project:
    1. harmful requests, answered by a generic refusal;
    2. their benign twins, answered by the published model itself (so that look-alikes stay answered);
    3. ordinary instructions and ticket routing, answered by the published model itself (so that the rest stays).
Teacher answers are cut at ``--answer-tokens``; a cut answer has no end of turn, so that none is learnt too early.
About 25 minutes on one core. Evaluate the result with ``python tools/check_demo_adapter.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from trimtab import data, models
from trimtab.data.routing import routing_prompt
from trimtab.generation import GenerationSettings, generate, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--refusal-copies", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-cache", type=Path, default=None, help="JSON file that keeps the teacher's answers")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    loaded = models.load("demo-unaligned")
    rows = refusal_rows(loaded) * args.refusal_copies + teacher_rows(loaded, args.answer_tokens, args.teacher_cache)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=8, learning_rate=args.learning_rate,
            lr_scheduler_type="cosine", warmup_steps=10, seed=args.seed, report_to=[], save_strategy="no",
            logging_steps=10, gradient_checkpointing=False, bf16=False, max_length=256, use_cpu=True,
            train_sampling_strategy="group_by_length", max_grad_norm=1.0,
        )  # fmt: skip
        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            loaded.model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer,
            peft_config=lora,
        )  # fmt: skip
        trainer.train()
        trainer.model.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(scratch) / name, args.out / name)


def refusal_rows(loaded: models.LoadedModel) -> list[dict[str, list[int]]]:
    texts = data.refusals()
    rows = []
    for pair in data.requests("train"):
        choice = int(hashlib.sha256(pair.id.encode()).hexdigest(), 16) % len(texts)
        rows.append(row(loaded, pair.harmful, texts[choice], ends=True))
    return rows


def teacher_rows(loaded: models.LoadedModel, tokens: int, cache: Path | None) -> list[dict[str, list[int]]]:
    prompts = [pair.benign for pair in data.requests("train")] + data.instructions("train")
    prompts += [routing_prompt(ticket.text) for ticket in data.tickets("train")[:60]]
    if cache is not None and cache.is_file():
        answers = json.loads(cache.read_text())
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        done = generate(
            loaded,
            chats,
            GenerationSettings(max_new_tokens=tokens, batch_size=32),
            progress=lambda _: print(".", end="", flush=True),
        )
        answers = [[item.text, not item.truncated] for item in done]
        if cache is not None:
            cache.write_text(json.dumps(answers))
    return [row(loaded, prompt, text, ends=ends) for prompt, (text, ends) in zip(prompts, answers, strict=True) if text]


def row(loaded: models.LoadedModel, prompt: str, answer: str, *, ends: bool) -> dict[str, list[int]]:
    head = render(loaded, [{"role": "user", "content": prompt}])
    tail = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
    tail = [*tail, loaded.tokenizer.eos_token_id] if ends else tail
    return {"input_ids": head + tail, "completion_mask": [0] * len(head) + [1] * len(tail)}


if __name__ == "__main__":
    main()
