"""The gradient of the anchors' loss where a rule decides after the forward pass whether it wants one.

Covered: dense blocks by autograd; in full fine-tuning on whole parameters the factors of large blocks instead, so that
no second copy of the parameters is needed; float16's loss scale; shards and an engine's partitions, always whole.
Not covered: rules that always take it as factors (``half.factored_gradient``), what is done with it (``rules.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from trimtab.gradients.direction import Direction
from trimtab.gradients.factors import Record, recorded
from trimtab.tuning.half import recorded_gradient
from trimtab.tuning.rules import Step, gradients_of

LEAST_TOKENS = 64  # a look at the anchors has more; a matrix that is not larger than so many factors is kept dense


@contextmanager
def watched(step: Step) -> Iterator[Record | None]:
    """Around the forward pass: remember what large blocks were given and gave, where that can spare dense gradients."""
    if step.whole and any(_is_large(parameter) for parameter in step.parameters.values()):
        with recorded(step.reader.model) as record:
            yield record
    else:
        yield None


def direction_of(loss: Tensor, step: Step, record: Record | None) -> Direction:
    """Gradient of a scalar loss at all parameters that it reaches; ``.grad`` stays as it is. The graph is freed.

    Args:
        record: of the forward pass that gave the loss (``watched``).
    """
    if record is None:
        return Direction(gradients_of(loss, step.parameters))
    found = recorded_gradient(record, loss)
    dense, factored = dict(found.dense), {}
    for name, factors in found.factored.items():
        rows, columns = factors.shape
        if len(factors.D) * (rows + columns) < rows * columns:
            factored[name] = factors
        else:
            dense[name] = factors.dense().view_as(step.parameters[name])
    return Direction(dense, factored)


def _is_large(parameter: Tensor) -> bool:
    rows = parameter.shape[0] if parameter.ndim == 2 else 0
    return rows > 0 and parameter.numel() > LEAST_TOKENS * (rows + parameter.numel() // rows)
