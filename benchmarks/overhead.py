"""What the guard costs: the same optimizer step with and without it, in one process, as paired ratios.

    python benchmarks/overhead.py --out runs/overhead
    python benchmarks/overhead.py --out runs/overhead-lora --lora --tokens 1024
    python benchmarks/overhead.py --out runs/overhead --model my-org/7b --device cuda

Each pair is one unguarded and one guarded step on the same batch, in alternating order. The table gives the median of
the pairs' ratios in processor time (robust where other programs share the machine) and in wall time, with the range,
and the memory that the guard adds to a step's peak. Rows:

    keel, watching     a step of a calm run: a glance, one forward over 4 anchors
    keel, looking      a step in which nothing drifted, of a run that is not calm yet: forward over 10 anchors
    keel, acting       a step that is corrected: both sides drifted
    keel, acting whole the same with a whole gradient of each side, as where parameters are sharded (full fine-tuning)
    keel, every fourth the mean over four steps with --guard_check_every 4 (a look at 10 anchors), nothing drifted
    spf                Algorithm 1, refreshed every step, gradients as factors
    naive spf          the same from the anchor's full gradient and a dense SVD of every block

Finished rows are kept in --out, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from trimtab import models
from trimtab.anchors import SafetyAnchors
from trimtab.gradients.surgery import project_out
from trimtab.tuning import anchor_gradients
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.rules import SpfRule

ROW = 64  # tokens of a row
WATCHED = anchor_gradients.LEAST_TOKENS
VARIANTS = (
    "keel, watching",
    "keel, looking",
    "keel, acting",
    "keel, acting whole",
    "keel, every fourth",
    "spf",
    "naive spf",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="tokens of a step")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="ROW")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    held: models.LoadedModel | None = None
    rows = []
    for tokens in args.tokens:
        for variant in args.variants:
            path = args.out / f"{tokens}-{variant.replace(', ', '-').replace(' ', '-')}.json"
            if not path.is_file():
                held = held or subject(args)
                path.write_text(json.dumps(measure(held, variant, tokens, 1 if variant == "naive spf" else args.pairs)))
            rows.append(json.loads(path.read_text()))
            (args.out / "table.md").write_text(table(rows))
    print((args.out / "table.md").read_text())


def subject(args: argparse.Namespace) -> models.LoadedModel:
    loaded = models.load(args.model, device=args.device)
    model: Any = loaded.model.requires_grad_(True)
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return models.LoadedModel(model, loaded.tokenizer, loaded.name)


def measure(
    held: models.LoadedModel, variant: str, tokens: int, pairs: int, anchors: SafetyAnchors | None = None
) -> dict[str, Any]:
    """Seconds of each unguarded and guarded step of the pairs, and the memory peaks of both."""
    model, device = held.model, held.model.device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(held.model.config.vocab_size, (tokens // ROW, ROW), generator=draw).to(device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(before: Callable[[], object] | None) -> tuple[float, float]:
        synchronise()
        wall, processor = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        if before is not None:
            before()
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        return time.perf_counter() - wall, time.process_time() - processor

    guarded = act(held, variant, anchors)
    step(None), step(guarded)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for pair in range(pairs):
        for one in (None, guarded) if pair % 2 else (guarded, None):
            times[one is not None].append(step(one))
    peaks = {is_on: peak_of(lambda on=is_on: step(guarded if on else None), device) for is_on in (False, True)}
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "variant": variant,
        "tokens": tokens,
        "device": str(device),
        "model": held.name,
        "trained": sum(p.numel() for p in trained),
        "parameter_bytes": kept,
        "unguarded": times[False],
        "guarded": times[True],
        "extra_bytes": peaks[True] - peaks[False],
        "share": 0.25 if "fourth" in variant else 1.0,
    }


def act(held: models.LoadedModel, variant: str, anchors: SafetyAnchors | None = None) -> Callable[[], object]:
    """What the guard does inside ``optimizer.step``; parameters do not move (the corrections are 1e-12 long).

    Args:
        anchors: None: bundled ones for keel, the published one for Algorithm 1.
    """
    anchor_gradients.LEAST_TOKENS = 10**9 if variant.endswith("whole") else WATCHED
    if variant.startswith("keel"):
        margin = -1.0 if "acting" in variant else 1e9
        calm_after = 0 if "watching" in variant else 10**9
        rule = KeelRule(margin=margin, largest_shift=1e-12, calm_after=calm_after)
        guard = SafetyGuard(held, anchors or SafetyAnchors.bundled(16), rule)
    else:
        guard = SafetyGuard(held, anchors or SafetyAnchors.published(), SpfRule())
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
        parameter.grad.copy_(project_out(parameter.grad, U).kept)


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of one call: the allocator's on an accelerator, the process's resident set on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device))
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the maximum since the start: an upper bound
    reset.write_text("5")  # sets the high-water mark back to the present
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """One row a variant; overheads in per cent of the unguarded step."""
    lines = [
        "| tokens | step | processor time | range | wall time | unguarded step, s | extra memory | of parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = list(zip(row["unguarded"], row["guarded"], strict=True))
        wall, processor = (
            [100 * row["share"] * (guarded[kind] / plain[kind] - 1) for plain, guarded in pairs] for kind in (0, 1)
        )
        plain = statistics.median(plain[1] for plain, _ in pairs)
        extra = row["extra_bytes"]
        lines.append(
            f"| {row['tokens']} | {row['variant']} | {statistics.median(processor):+.1f} % | {min(processor):+.1f} to "
            f"{max(processor):+.1f} % | {statistics.median(wall):+.1f} % | {plain:.2f} | {extra / 1e6:.0f} MB | "
            f"{100 * extra / row['parameter_bytes']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
