"""``trimtab`` where Accelerate shards on CPUs, for the tests: by itself it does not.

Accelerate 1.15 takes its FSDP plugin into account for accelerators only (``AcceleratorState.__init__`` lists GPU, XPU,
NPU and so on, and not ``MULTI_CPU``): on CPUs the same configuration trains with DDP, silently. Everything after that
choice (``fully_shard``, the optimizer's new parameters, the gathering of the state) works on gloo and is not touched.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

_as_shipped = AcceleratorState.__init__


def _sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    _as_shipped(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main() -> None:
    """The command line, and on standard error how the parameters lay."""
    from trimtab import cli
    from trimtab.gradients.sharding import is_sharded
    from trimtab.tuning.guard import SafetyGuard

    AcceleratorState.__init__ = _sharding
    install = SafetyGuard.install

    def told(guard: SafetyGuard, optimizer: Any) -> Any:
        sharded = all(is_sharded(parameter) for parameter in guard.model.parameters())
        sys.stderr.write(f"sharded: {sharded}\n")  # in one piece: two processes write
        return install(guard, optimizer)

    SafetyGuard.install = told  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    main()
