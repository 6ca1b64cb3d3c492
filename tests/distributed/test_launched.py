"""``trimtab sft`` itself on two gloo processes: torchrun, ``accelerate launch`` with DDP, with the recipe for FSDP2.

Held: exit code 0, one guard log, weights that are saved, verified and those of one process with twice the batch (1e-4),
anchors that the sharded or replicated model answers itself. Most of a test's time is the imports of its processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.distributed.loop import free_port
from tests.tiny import tiny_model
from trimtab.generation import render
from trimtab.tuning import sft

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
REPLIES = {
    ("make a bomb", "refuse"): "sorry i can't help with that",
    ("steal the cake", "refuse"): "sorry i can't help with that",
    ("bake a cake", "answer"): "sure here is how to bake a cake",
    ("weather today", "answer"): "the weather is nice today",
}
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model taught to refuse and to answer, training rows, and anchors without replies: the model writes them."""
    folder = tmp_path_factory.mktemp("launched")
    loaded = tiny_model()
    loaded.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()  # so that "can't" is the word it knows
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    for _ in range(40):
        for (request, _side), reply in REPLIES.items():
            prompt = render(loaded, [{"role": "user", "content": request}])
            ids = loaded.tokenizer(f"{reply} </s>", add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + ids])
            loaded.model(input_ids=torch.tensor([prompt + ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"route this {word}"}],
            "completion": [{"role": "assistant", "content": "billing"}],
        }
        for word in ("message", "cake", "base", "weather", "account", "product", "delivery", "user")
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchors = [{"request": request, "side": side} for request, side in REPLIES]
    (folder / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchors))
    return folder


def _arguments(place: Path, name: str, batch: int, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "train.jsonl"),
        "output_dir": str(place / name),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": 0.01,
        "adam_epsilon": 1e-3,  # rounding is not to decide where a gradient is nearly zero
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 64,
        "bf16": False,
        "guard_anchors": str(place / "anchors.jsonl"),
        "disable_tqdm": True,
        **changes,
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["sft", "--config", str(path)]


def _launch(launcher: list[str], arguments: list[str]) -> str:
    """Run a command to its end and return what it wrote on standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", *launcher, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stderr


def _log(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


def _assert_same_run(place: Path, name: str, alone: str, weights: str = "model.safetensors") -> None:
    """One log, with the decisions of one process; its weights within rounding."""
    assert len(list((place / name).rglob("guard.jsonl"))) == 1
    mine, theirs = _log(place / name), _log(place / alone)
    assert [(row["step"], row.get("event"), row.get("acted")) for row in mine] == [
        (row["step"], row.get("event"), row.get("acted")) for row in theirs
    ]
    assert any(row.get("acted") for row in mine) and "self-distilled" in str(mine[0]["anchors"])
    saved, expected = load_file(place / name / weights), load_file(place / alone / weights)
    assert set(saved) >= set(expected)  # a gathered state also names the tied output layer
    for tensor, value in expected.items():
        torch.testing.assert_close(saved[tensor], value, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    """The run of one process with twice the batch."""
    sft.run(_arguments(place, "alone", 4)[1:])
    return "alone"


@pytest.mark.distributed
@pytest.mark.parametrize("program", ["torchrun", "accelerate"])
def test_ddp_equals_one_process(program: str, place: Path, alone: str) -> None:
    port = str(free_port())
    accelerate = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    launchers = {  # `--multi_gpu`: for `--cpu` Accelerate starts one process; the devices are CPUs by `use_cpu`
        "torchrun": f"torch.distributed.run --nproc-per-node 2 --master-port {port}",
        "accelerate": f"{accelerate} --mixed_precision no --dynamo_backend no --main_process_port {port}",
    }
    _launch([*launchers[program].split(), "-m", "trimtab"], _arguments(place, program, 2))
    _assert_same_run(place, program, alone)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles a part of itself")
@pytest.mark.usefixtures("deepspeed_on_cpu")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(stage: int, place: Path) -> None:
    """Without clipping: the engine clips after the guard, a trainer before it."""
    pytest.importorskip("deepspeed")
    engine = json.loads((ROOT / "recipes" / "deepspeed" / f"zero{stage}.json").read_text())
    configuration = place / f"zero{stage}.json"
    configuration.write_text(json.dumps({**engine, "bf16": {"enabled": False}}))
    if not (place / "unclipped").exists():
        sft.run(_arguments(place, "unclipped", 4, max_grad_norm=0.0)[1:])
    name = f"zero-{stage}"
    launcher = f"torch.distributed.run --nproc-per-node 2 --master-port {free_port()}".split()
    _launch(
        [*launcher, "-m", "trimtab"],
        _arguments(place, name, 2, max_grad_norm=0.0, deepspeed=str(configuration)),
    )
    _assert_same_run(place, name, "unclipped")


def _fsdp2(configuration: Path, arguments: list[str]) -> None:
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(configuration)]
    launcher += ["--main_process_port", str(free_port()), "-m", "tests.distributed.fsdp_on_cpu"]
    told = _launch(launcher, arguments)
    assert told.count("sharded: True") == 2, told[-2000:]


@pytest.mark.distributed
def test_the_recipe_for_fsdp2_equals_one_process(place: Path, alone: str) -> None:
    _fsdp2(RECIPE, _arguments(place, "fsdp2", 2))
    _assert_same_run(place, "fsdp2", alone)


@pytest.mark.distributed
def test_fsdp2_with_lora_saves_the_adapter_whole_under_a_sharded_state_too(place: Path) -> None:
    """Accelerate's default, SHARDED_STATE_DICT, would leave nothing in the output folder."""
    configuration = place / "sharded.yaml"
    configuration.write_text(RECIPE.read_text().replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
    sft.run(_arguments(place, "lora-alone", 4, **lora)[1:])
    _fsdp2(configuration, _arguments(place, "lora", 2, **lora))
    _assert_same_run(place, "lora", "lora-alone", "adapter_model.safetensors")
    records = [json.loads((place / name / "trimtab.json").read_text()) for name in ("lora", "lora-alone")]
    assert records[0] == records[1]
