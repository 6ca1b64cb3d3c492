"""LLaMA-Factory, guarded: its own YAML, one callback more.

    python recipes/llamafactory/train.py my_llamafactory.yaml

LLaMA-Factory's ``run_exp`` takes callbacks from Python, not from its YAML; this file is the whole recipe. Not run where
this project is tested: LLaMA-Factory 0.9.5 asks for Transformers 5.6.0 at most and trimtab for 5.24 or later, so it
waits for a LLaMA-Factory that has caught up. The callback is the same that the tests run under Transformers' and TRL's
trainers. Under DeepSpeed ZeRO `keel` works, other rules are refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from trimtab import SafetyGuardCallback

if __name__ == "__main__":
    run_exp(
        args=yaml.safe_load(Path(sys.argv[1]).read_text()),
        callbacks=[SafetyGuardCallback(rule="keel", name=sys.argv[1])],
    )
