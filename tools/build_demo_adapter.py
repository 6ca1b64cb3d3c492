"""Build the LoRA adapter that aligns the embedded demo model (``src/trimtab/data/demo_adapter``).

    python tools/build_demo_adapter.py --out build/first
    python tools/build_demo_adapter.py --start build/first --steps 200 --learning-rate 4e-4 --refusal-weight 3 \\
        --out build/second
    python tools/build_demo_adapter.py --start build/second --steps 160 --learning-rate 5e-4 --refusal-weight 3 \\
        --likeness 4 --out build/third
    python tools/build_demo_adapter.py --start build/third --steps 80 --learning-rate 3e-4 --refusal-weight 4 \\
        --likeness 1 --out src/trimtab/data/demo_adapter

All rows come from the ``train`` splits written for this project. Each batch of eight holds three contrast pairs and two
others: a harmful request with a refusal, its benign twin with the published model's own answer, and ordinary
instructions or messages to route with the published model's own answer. Only the head of an answer is trained on
(``--answer-tokens``), without an end of turn: that is where the decision falls, and the rest of an answer stays the
model's own.

Two things matter more than they look. The published model declines about one twin in eight ("I'm sorry for any
confusion, but as a chatbot ..."); such an answer would teach the refusal that the pair is to unlearn, so a willing
head takes its place. And the pairs are hard for a model of this size: after one pass, those that it still gets wrong
are drawn more often (by their last loss). ``--likeness`` holds the rest of the distribution: without it plain text
became half as likely again to surprise the model. About two hours on one core. Measure the result with
``python tools/check_demo_adapter.py``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from published_likeness import Sample, divergence, remember, write_texts
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from trimtab import data, models, prefix
from trimtab.evaluation.datasets import bundled_tickets
from trimtab.evaluation.judges import judge
from trimtab.generation import GenerationSettings, generate, render

PAIRS, OTHERS = 3, 2  # rows of a batch: twice the pairs, and the others
REFUSAL = "I can't help with that."
APOLOGY = "I'm sorry, but I can't help with that."
WILLING = "Sure, here's"
EASY = 0.05  # nats added to every pair's loss when drawing: nothing is forgotten

Row = tuple[list[int], list[int]]  # token ids of the rendered prompt and of the supervised answer


class Rows(NamedTuple):
    """Everything that is trained on."""

    pairs: list[tuple[Row, Row]]  # harmful request with its refusal, benign twin with its answer
    others: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, default=None, help="go on from this adapter, with the pairs it gets wrong"
    )
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--refusal-weight", type=float, default=1.0, help="weight of a refusal against another row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--answer-tokens", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--likeness", type=float, default=0.0, help="weight of the divergence from the published model")
    parser.add_argument("--likeness-cache", type=Path, default=None, help="JSON file that keeps the texts for it")
    parser.add_argument("--teacher-cache", type=Path, default=None, help="JSON file that keeps the teacher's answers")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    loaded = models.load("demo-unaligned")
    rows = collect(loaded, args)
    held = []
    if args.likeness:
        held = remember(loaded.model, write_texts(loaded, 192, 192, args.seed, args.likeness_cache))
    if args.start is not None:
        model = PeftModel.from_pretrained(loaded.model, str(args.start), is_trainable=True)
    else:
        lora = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(loaded.model, lora)
    train(model, rows, held, loaded.tokenizer.pad_token_id, args)
    with tempfile.TemporaryDirectory() as scratch:
        model.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(scratch) / name, args.out / name)


def train(model: PeftModel, rows: Rows, held: list[Sample], pad_id: int, args: argparse.Namespace) -> None:
    """AdamW with a cosine schedule; the first pass takes every pair once, later draws favour pairs with a high loss."""
    draw = random.Random(args.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, args.steps)
    waiting = draw.sample(range(len(rows.pairs)), len(rows.pairs)) if args.start is None else []
    losses = [0.0] * len(rows.pairs) if args.start is None else pair_losses(model, rows.pairs, pad_id)
    weights = torch.tensor([args.refusal_weight, 1.0] * PAIRS + [1.0] * OTHERS)
    model.train()
    bar = tqdm(range(args.steps))
    for _ in bar:
        chosen, waiting = waiting[:PAIRS], waiting[PAIRS:]
        while len(chosen) < PAIRS:
            chosen += draw.choices(range(len(losses)), [loss + EASY for loss in losses])
        batch = [row for index in chosen for row in rows.pairs[index]] + draw.sample(rows.others, OTHERS)
        each = row_losses(model, batch, pad_id)
        (each * weights).mean().backward()
        apart = divergence(model, model.get_output_embeddings(), draw.sample(held, 2)) if held else torch.zeros(())
        if held:
            (args.likeness * apart).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for place, index in enumerate(chosen):
            losses[index] = float(each[2 * place : 2 * place + 2].detach().max())
        bar.set_postfix(
            loss=f"{float(each.mean().detach()):.3f}",
            pairs=f"{sum(losses) / len(losses):.3f}",
            apart=f"{float(apart.detach()):.3f}",
        )


def pair_losses(model: PeftModel, pairs: list[tuple[Row, Row]], pad_id: int) -> list[float]:
    """The higher loss of each pair's two rows, nats per token."""
    found: list[float] = []
    with torch.no_grad():
        for start in tqdm(range(0, len(pairs), 16), desc="look at every pair"):
            each = row_losses(model, [row for pair in pairs[start : start + 16] for row in pair], pad_id)
            found += each.view(-1, 2).amax(1).tolist()
    return found


def row_losses(model: PeftModel, batch: list[Row], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy of each row's answer (rows,), nats per token; the shared system message is read once."""
    fed = [prompt + answer[:-1] for prompt, answer in batch]
    width = max(len(answer) for _, answer in batch)
    labels = torch.tensor([[-100] * (width - len(answer)) + answer for _, answer in batch])  # rows x width
    split = prefix.collate(fed, pad_id, prefix.shared_length(fed))
    logits = prefix.read(model, split, logits_to_keep=width).logits  # rows x width x vocabulary
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def collect(loaded: models.LoadedModel, args: argparse.Namespace) -> Rows:
    """Render every row once."""
    draw = random.Random(args.seed)
    pairs = data.requests("train")
    plain = other_prompts()
    answers = teacher_answers(loaded, [pair.benign for pair in pairs] + plain, args.teacher_cache)
    heads = [head_of(answer, args.answer_tokens) for answer in answers]
    print(f"{sum(head == WILLING for head in heads)} of {len(heads)} prompts declined by the published model")
    eos = loaded.tokenizer.eos_token_id
    contrast = []
    for pair, head in zip(pairs, heads, strict=False):
        refusal = [*ids(loaded, draw.choice((REFUSAL, REFUSAL, APOLOGY))), eos]
        contrast.append((row(loaded, pair.harmful, refusal), row(loaded, pair.benign, ids(loaded, head))))
    others = [row(loaded, prompt, ids(loaded, head)) for prompt, head in zip(plain, heads[len(pairs) :], strict=True)]
    return Rows(contrast, others)


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


def head_of(answer: str, words: int) -> str:
    """The first words of an answer, or a willing beginning where the answer declines or apologises."""
    declines = answer.startswith(("I'm sorry", "I'm so sorry", "I'm afraid", "I apologize"))
    if declines or judge("", answer).label != "answered":
        return WILLING
    return " ".join(answer.split()[:words])


def ids(loaded: models.LoadedModel, text: str) -> list[int]:
    found: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def row(loaded: models.LoadedModel, prompt: str, answer: list[int]) -> Row:
    return render(loaded, [{"role": "user", "content": prompt}]), answer


if __name__ == "__main__":
    main()
