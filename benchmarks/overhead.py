"""What the guard costs: the same optimizer step with and without it, in one process, as paired ratios.

    python benchmarks/overhead.py --tokens 1024 --rules keel spf --pairs 8
    python benchmarks/overhead.py --model demo --lora --tokens 1024

Each pair is one unguarded and one guarded step on the same batch, in alternating order; the table gives the median
ratio and its range. `keel (watching)` is a step in which nothing drifted (forward only), `keel (acting)` one that is
corrected.
`naive spf` builds the anchor's full gradient and a dense SVD of every block each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from trimtab import models
from trimtab.anchors import SafetyAnchors
from trimtab.gradients.surgery import project_out
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.rules import KeelRule, SpfRule

ROW = 64  # tokens of a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rules", nargs="+", default=["keel", "spf"], choices=["keel", "spf", "naive"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = models.load(args.model)
    model = get_peft_model(loaded.model, LoraConfig(r=8, target_modules="all-linear")) if args.lora else loaded.model
    held = models.LoadedModel(model, loaded.tokenizer, loaded.name)
    rows = {name: measure(held, name, args) for name in variants(args.rules)}
    print("| step | median ratio | range | seconds unguarded |")
    print("|---|---|---|---|")
    for name, (ratios, plain) in rows.items():
        print(f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f}-{max(ratios):.3f} | {plain:.2f} |")
    print(json.dumps({"tokens": args.tokens, "lora": args.lora, "ratios": {name: r for name, (r, _) in rows.items()}}))


def variants(rules: list[str]) -> list[str]:
    names = {"keel": ["keel (watching)", "keel (acting)"], "spf": ["spf"], "naive": ["naive spf"]}
    return [variant for rule in rules for variant in names[rule]]


def measure(held: models.LoadedModel, variant: str, args: argparse.Namespace) -> tuple[list[float], float]:
    """Ratios guarded / unguarded, and the median unguarded step in seconds."""
    model = held.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    ids = torch.randint(1000, 40000, (args.tokens // ROW, ROW), generator=torch.Generator().manual_seed(0))

    def step(before: Callable[[], object] | None) -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        if before is not None:
            before()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    guarded = act(held, variant)
    step(None), step(guarded)
    ratios, plain = [], []
    for pair in range(args.pairs):
        order = (None, guarded) if pair % 2 else (guarded, None)
        seconds = {one is not None: step(one) for one in order}
        ratios.append(seconds[True] / seconds[False])
        plain.append(seconds[False])
    return ratios, statistics.median(plain)


def act(held: models.LoadedModel, variant: str) -> Callable[[], object]:
    """What the guard does inside ``optimizer.step``; parameters do not move (the corrections have length zero)."""
    if variant.startswith("keel"):
        margin = -1.0 if "acting" in variant else float("inf")
        guard = SafetyGuard(held, SafetyAnchors.bundled(16), KeelRule(margin=margin, largest_shift=0.0))
    else:
        guard = SafetyGuard(held, SafetyAnchors.published(), SpfRule())
    guard.prepare()
    if variant == "naive spf":
        return lambda: naive(guard)
    return lambda: guard._on_step(None, (None,), {})


def naive(guard: SafetyGuard) -> None:
    """Full anchor gradient by autograd, dense SVD and projection of every block."""
    parameters = {name: p for name, p in guard.model.named_parameters() if p.requires_grad}
    loss = guard.reader.losses(guard.pools["refuse"].rows).mean()
    anchor = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for parameter, gradient in zip(parameters.values(), anchor, strict=True):
        if gradient is None or parameter.grad is None:
            continue
        U = torch.linalg.svd(gradient.reshape(gradient.shape[0], -1), full_matrices=False)[0][:, :20]
        parameter.grad.copy_(project_out(parameter.grad, U))


if __name__ == "__main__":
    main()
