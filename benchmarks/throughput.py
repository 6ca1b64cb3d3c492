"""Prompts a second of trimtab's provider, inspect's ``hf`` provider and lm-eval's HF backend: same prompts, one run.

    python benchmarks/throughput.py [--model FOLDER] [--prompts 128] [--new-tokens 128] [--batch-size 16] [--json FILE]
    python benchmarks/throughput.py --batch-size 0

The model is saved to a folder first (default: the demo model, merged), so that all three load the same weights in
float32. Prompts: bundled requests of both sides, of mixed length. Greedy. The order is shuffled, each engine in a fresh
process, the wall time is that of generation only (from the first request to the last answer). A batch size of 0 leaves
each engine at its own default: what fits into memory, 64 at most (trimtab), 32 (inspect's ``hf``), 1 (lm-eval).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = ("trimtab", "inspect-hf", "lm-eval-hf")
OWN_DEFAULTS = {"inspect-hf": 32, "lm-eval-hf": 1}


def prompts(count: int) -> list[str]:
    """Requests of both sides and tickets, interleaved by a fixed seed."""
    from trimtab.evaluation.datasets import bundled_requests, bundled_tickets

    texts = [one.text for side in ("harmful", "benign") for one in bundled_requests(side=side, split="eval").prompts]
    texts += [one.text for one in bundled_tickets().prompts]
    random.Random(0).shuffle(texts)
    return texts[:count]


def through_inspect(
    model: Any, texts: list[str], tokens: int, connections: int, temperature: float | None = 0.0
) -> tuple[float, list[str]]:
    """Ask an inspect model through ``inspect_ai.eval``, as a user would."""
    from inspect_ai import Task
    from inspect_ai import eval as inspect_eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.solver import generate

    samples = [Sample(id=str(place), input=text) for place, text in enumerate(texts)]
    config = GenerateConfig(max_tokens=tokens, temperature=temperature, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        (log,) = inspect_eval(
            Task(dataset=samples, solver=[generate()], config=config), model=model, log_dir=folder, display="none",
            max_connections=connections, max_samples=len(texts), score=False, adaptive_connections=False,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        if log.status != "success":
            raise RuntimeError(log.error.message if log.error else log.status)
        answers = {str(sample.id): sample.output.completion for sample in log.samples or ()}
    return seconds, [answers[str(place)] for place in range(len(texts))]


def run_engine(engine: str, folder: str, texts: list[str], tokens: int, batch: int) -> tuple[float, list[str]]:
    """Seconds and answers of one engine in this process; its model is warm before the clock starts."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_flush_denormal(True)
    warm = texts[:2]
    batch = batch or OWN_DEFAULTS.get(engine, 0)
    if engine == "trimtab":
        from trimtab.evaluation.provider import provider_for
        from trimtab.models import load

        model = provider_for(load(folder), batch_size=batch or None)
        through_inspect(model, warm, 4, 2)
        return through_inspect(model, texts, tokens, len(texts))
    if engine == "inspect-hf":
        from inspect_ai.model import get_model

        model = get_model(
            "hf/local", model_path=folder, tokenizer_path=folder, batch_size=batch, device="cpu", do_sample=False
        )  # its way to say greedy; it refuses a temperature of 0
        through_inspect(model, warm, 4, 2, None)
        return through_inspect(model, texts, tokens, batch, None)
    return through_lm_eval(folder, texts, tokens, batch)


def through_lm_eval(folder: str, texts: list[str], tokens: int, batch: int) -> tuple[float, list[str]]:
    """lm-eval's HF backend, asked for the same chats."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, batch_size=batch, device="cpu", dtype="float32")

    def ask(asked: list[str], new: int) -> list[str]:
        chats = [model.apply_chat_template([{"role": "user", "content": text}]) for text in asked]
        settings = {"until": [model.tokenizer.eos_token], "max_gen_toks": new, "do_sample": False}
        requests = [Instance("generate_until", {}, (chat, dict(settings)), place) for place, chat in enumerate(chats)]
        return list(model.generate_until(requests, disable_tqdm=True))

    ask(texts[:2], 4)
    begun = time.perf_counter()
    answers = ask(texts, tokens)
    return time.perf_counter() - begun, answers


def save_demo(folder: Path) -> None:
    """The aligned demo model with its adapter merged, as an ordinary folder."""
    from trimtab.convert import convert

    if not (folder / "config.json").is_file():
        convert("demo", folder)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder; default: the demo model, written to --work")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "trimtab-throughput")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help="run one engine in this process and print JSON")
    args = parser.parse_args()
    folder = args.model or args.work / "demo"
    texts = prompts(args.prompts)
    if args.engine:
        seconds, answers = run_engine(args.engine, str(folder), texts, args.new_tokens, args.batch_size)
        print("RESULT " + json.dumps({"seconds": seconds, "answers": answers}))
        return 0
    if args.model is None:
        save_demo(folder)
    found: dict[str, list[float]] = {}
    answers: dict[str, list[str]] = {}
    for _ in range(args.repeats):
        for engine in ENGINES:
            command = [sys.executable, __file__, "--engine", engine, "--model", str(folder), "--prompts",
                       str(args.prompts), "--new-tokens", str(args.new_tokens), "--batch-size",
                       str(args.batch_size)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((one for one in done.stdout.splitlines() if one.startswith("RESULT ")), None)
            if line is None:
                print(done.stderr[-3000:], file=sys.stderr)
                return 2
            result = json.loads(line.removeprefix("RESULT "))
            found.setdefault(engine, []).append(result["seconds"])
            answers[engine] = result["answers"]
            print(f"{engine}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    ours = min(found["trimtab"])
    print("| engine | seconds | prompts/s | trimtab is faster by | same answers as trimtab |\n|---|---|---|---|---|")
    for engine, seconds in found.items():
        same = sum(one.strip() == two.strip() for one, two in zip(answers["trimtab"], answers[engine], strict=True))
        best = min(seconds)
        print(f"| {engine} | {best:.1f} | {len(texts) / best:.2f} | {best / ours:.2f} x | {same}/{len(texts)} |")
    if args.json:
        args.json.write_text(json.dumps({"seconds": found, "prompts": len(texts), "new_tokens": args.new_tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
