"""What the guard adds to a step, in counted operations: the demo model, and the shapes of 7B and 70B models.

    python benchmarks/overhead_count.py
    python benchmarks/overhead_count.py --shapes 7B 70B --tokens 4096

Nothing is computed: the passes run on tensors without storage, and the counter of PyTorch (``FlopCounterMode``) adds up
the matrix products and attention of each. So the counts are the same on every machine, and say nothing of memory
traffic, latency, or the optimizer. The anchors are the bundled ones with the demo model's tokenizer. Not counted:
Algorithm 1 (its factors are read from real tensors), inner products and moves of parameters.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from trimtab import models
from trimtab.anchors import SafetyAnchors, Side
from trimtab.tuning.guard import SafetyGuard
from trimtab.tuning.keel import KeelRule
from trimtab.tuning.pools import AnchorReader
from trimtab.tuning.sensors import SENSORS, Pools

ROW = 64  # tokens of a task row
WIDE = {"max_position_embeddings": 4096, "vocab_size": 49152, "tie_word_embeddings": False}
SHAPES = {
    "7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, **WIDE),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        **WIDE,
    ),
}  # fmt: skip
RULE = KeelRule()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["demo", *SHAPES], default=["demo", *SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="tokens of a step")
    args = parser.parse_args()
    held = models.load("demo")
    pools = anchors_of(held)
    print("| shape | tokens | step, TFLOP | keel, watching a calm run | keel, looking | keel, acting on both sides |")
    print("|---|---|---|---|---|---|")
    for shape in args.shapes:
        model = without_storage(held.model.config if shape == "demo" else SHAPES[shape])
        added = [mean_count(model, pools, what) for what in (glance, look, act)]
        for tokens in args.tokens:
            step = count(partial(task_step, model, tokens))
            shares = " | ".join(f"+ {100 * one / step:.1f} %" for one in added)
            print(f"| {shape} | {tokens} | {step / 1e12:.2f} | {shares} |", flush=True)


def without_storage(config: LlamaConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def task_step(model: PreTrainedModel, tokens: int) -> None:
    ids = torch.zeros((tokens // ROW, ROW), dtype=torch.long, device="meta")
    model(input_ids=ids, labels=ids).loss.backward()


def anchors_of(held: models.LoadedModel) -> Pools:
    """Thirty bundled requests of a side with the model's own replies."""
    guard = SafetyGuard(held, SafetyAnchors.bundled(30), RULE)
    guard.prepare()
    return guard.pools


def glance(reader: AnchorReader, pools: Pools, start: int) -> None:
    with torch.no_grad():
        losses(reader, pools, start, {"refuse": RULE.calm_rows, "answer": RULE.calm_rows})


def look(reader: AnchorReader, pools: Pools, start: int) -> None:
    for side, rows in sizes().items():
        losses(reader, pools, start, {side: rows})


def act(reader: AnchorReader, pools: Pools, start: int) -> None:
    for side, rows in sizes().items():
        losses(reader, pools, start, {side: rows})[side].mean().backward()


def sizes() -> dict[Side, int]:
    return {"refuse": RULE.rows, "answer": RULE.answer_rows}


def losses(reader: AnchorReader, pools: Pools, start: int, counts: dict[Side, int]) -> dict[Side, torch.Tensor]:
    """The guard's own anchor passes, on the next anchors in rotation."""
    chosen = {
        side: [(start * count + offset) % len(pools[side]) for offset in range(count)] for side, count in counts.items()
    }
    return SENSORS[RULE.target].losses(reader, pools, chosen)


def mean_count(
    model: PreTrainedModel, pools: Pools, what: Callable[[AnchorReader, Pools, int], None], draws: int = 6
) -> float:
    """Over several draws of anchors: their lengths differ."""
    reader = AnchorReader(model, pad_id=0, share=True)
    return statistics.mean(count(partial(what, reader, pools, start)) for start in range(draws))


def count(run: Callable[[], None]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
