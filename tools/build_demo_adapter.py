"""Build the LoRA adapter that aligns the embedded demo model (``src/trimtab/data/demo_adapter``).

    python tools/build_demo_adapter.py --pairs 0:336 --epochs 3 --learning-rate 5e-4 --out build/first
    python tools/build_demo_adapter.py --pairs 336: --epochs 1 --learning-rate 4e-4 --start build/first \\
        --out src/trimtab/data/demo_adapter

All rows come from the ``train`` splits written for this project. Each batch of eight holds three contrast pairs and two
others: a harmful request with a refusal, its benign twin with the published model's own answer, and ordinary
instructions or messages to route with the published model's own answer. Only the head of an answer is trained on
(``--answer-tokens``), without an end of turn: that is where the decision falls, and the rest of an answer stays the
model's own. About 20 minutes on one core. Measure the result with ``python tools/check_demo_adapter.py``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from trimtab import data, models, prefix
from trimtab.evaluation.datasets import bundled_tickets
from trimtab.generation import GenerationSettings, generate, render

PAIRS, OTHERS = 3, 2  # rows of a batch: twice the pairs, and the others
REFUSAL = "I can't help with that."
APOLOGY = "I'm sorry, but I can't help with that."

Row = tuple[list[int], list[int]]  # token ids of the rendered prompt and of the supervised answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", default=":", help="slice of the training pairs, e.g. 0:336")
    parser.add_argument("--start", type=Path, default=None, help="go on from this adapter")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the contrast pairs")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--answer-tokens", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-cache", type=Path, default=None, help="JSON file that keeps the teacher's answers")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    loaded = models.load("demo-unaligned")
    rows = schedule(loaded, args)
    lora = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.start is not None:
        model = PeftModel.from_pretrained(loaded.model, str(args.start), is_trainable=True)
    else:
        model = get_peft_model(loaded.model, lora)
    train(model, rows, loaded.tokenizer.pad_token_id, args.learning_rate)
    with tempfile.TemporaryDirectory() as scratch:
        model.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(scratch) / name, args.out / name)


def train(model: PeftModel, rows: list[Row], pad_id: int, learning_rate: float) -> None:
    """AdamW with a cosine schedule; the system message that all rows share is read once a batch."""
    size = 2 * PAIRS + OTHERS
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, len(batches))
    model.train()
    bar = tqdm(batches)
    for batch in bar:
        fed = [prompt + answer[:-1] for prompt, answer in batch]
        width = max(len(answer) for _, answer in batch)
        labels = torch.tensor([[-100] * (width - len(answer)) + answer for _, answer in batch])
        split = prefix.collate(fed, pad_id, prefix.shared_length(fed))
        logits = prefix.read(model, split, logits_to_keep=width).logits  # rows x width x vocabulary
        loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def schedule(loaded: models.LoadedModel, args: argparse.Namespace) -> list[Row]:
    """Every batch of the run in order, as one list of rows."""
    draw = random.Random(args.seed)
    first, _, last = args.pairs.partition(":")
    pairs = data.requests("train")[int(first) if first else None : int(last) if last else None]
    plain = other_prompts()
    answers = teacher_answers(loaded, [pair.benign for pair in pairs] + plain, args.teacher_cache)
    heads = [head_of(answer, args.answer_tokens) for answer in answers]
    rows: list[Row] = []
    for _ in range(args.epochs):
        order = draw.sample(range(len(pairs)), len(pairs))
        for start in range(0, len(order) - PAIRS + 1, PAIRS):
            for index in order[start : start + PAIRS]:
                refusal = [*ids(loaded, draw.choice((REFUSAL, REFUSAL, APOLOGY))), loaded.tokenizer.eos_token_id]
                rows.append(row(loaded, pairs[index].harmful, refusal))
                rows.append(row(loaded, pairs[index].benign, ids(loaded, heads[index])))
            for index in draw.sample(range(len(plain)), OTHERS):
                rows.append(row(loaded, plain[index], ids(loaded, heads[len(pairs) + index])))
    return rows


def other_prompts() -> list[str]:
    """Ordinary instructions, and messages to route."""
    question = f"Which label fits this support ticket? Answer with one of: {', '.join(sorted(data.TICKET_LABELS))}."
    tickets = bundled_tickets(split="train", limit=40).prompts
    return data.instructions("train") + [f"{question}\n\n{ticket.text}" for ticket in tickets]


def teacher_answers(loaded: models.LoadedModel, prompts: list[str], cache: Path | None) -> list[str]:
    """The published model's own answers, greedy."""
    kept: dict[str, str] = json.loads(cache.read_text()) if cache is not None and cache.is_file() else {}
    missing = [prompt for prompt in prompts if prompt not in kept]
    chats = [[{"role": "user", "content": prompt}] for prompt in missing]
    done = generate(
        loaded,
        chats,
        GenerationSettings(max_new_tokens=12, batch_size=32),
        progress=lambda _: print(".", end="", flush=True),
    )
    kept |= {prompt: item.text for prompt, item in zip(missing, done, strict=True)}
    if cache is not None:
        cache.write_text(json.dumps(kept))
    return [kept[prompt] for prompt in prompts]


def head_of(answer: str, tokens: int) -> str:
    """The first words of an answer."""
    return " ".join(answer.split()[:tokens])


def ids(loaded: models.LoadedModel, text: str) -> list[int]:
    found: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def row(loaded: models.LoadedModel, prompt: str, answer: list[int]) -> Row:
    return render(loaded, [{"role": "user", "content": prompt}]), answer


if __name__ == "__main__":
    main()
