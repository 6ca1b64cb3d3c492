"""The given model as it was, where a repair leaves nothing behind.

``attach`` puts layers into the given model, freezes its parameters and ends its training mode; PEFT also leaves its
configuration on a plain model. Covered: taking all of that back. Not covered: weights trained in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trimtab.models import LoadedModel
from trimtab.patching.adapters import Workbench, attach, detach


class Given:
    """Remembers which parameters of a model train and which of its modules are in training mode."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model: Any = loaded.model
        self.gradients = [(p, p.requires_grad) for p in self.model.parameters()]
        self.modes = [(module, module.training) for module in self.model.modules()]

    def restore(self) -> Any:
        """The model with its flags as they were; nothing may be attached to it."""
        for parameter, wanted in self.gradients:
            parameter.requires_grad_(wanted)
        for module, mode in self.modes:
            module.training = mode
        return self.model

    def back(self, bench: Workbench) -> Any:
        """The same without the repair, which was attached after this was made."""
        detach(bench)
        if not bench.given:
            vars(self.model).pop("peft_config", None)  # else the next adapter would count as a second one
        return self.restore()

    @contextmanager
    def unless_done(self, bench: Workbench) -> Iterator[None]:
        """Take the repair off again where the block raises."""
        try:
            yield
        except BaseException:
            self.back(bench)
            raise


@contextmanager
def borrowed(loaded: LoadedModel, *, rank: int, alpha: int, seed: int) -> Iterator[Workbench]:
    """A workbench for the time of the block; the model is then as it was."""
    given = Given(loaded)
    bench = attach(loaded, rank=rank, alpha=alpha, seed=seed)
    try:
        yield bench
    finally:
        given.back(bench)
