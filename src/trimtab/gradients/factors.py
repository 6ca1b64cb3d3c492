"""The gradient of a short text, kept as factors and never built.

For a linear layer ``y = x W^T`` the gradient of a loss with respect to ``W`` is ``G = D^T X`` with ``D = dL/dy``
(tokens x out) and ``X`` (tokens x in), so its rank is at most the number of tokens. One forward and one backward
through the activations give ``D`` and ``X`` for every layer; no weight gradient is formed.

Covered: ``nn.Linear`` (LoRA's A and B are such), ``nn.Embedding``, weights that are tied or used more than once; every
other trainable parameter (norms, biases, stacked experts, a weight used without its module) as a dense gradient.
Not covered: one weight used both through its module and without it (the second use is not seen), what is done with the
gradient (``surgery.py``), which text it is taken on (``tuning/``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trimtab.errors import GuardError
from trimtab.gradients.sums import dot, squared_norm


@dataclass(frozen=True)
class Factors:
    """``G = D^T X``. ``D``: tokens x rows, ``X``: tokens x columns, both float32."""

    D: Tensor
    X: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the gradient matrix."""
        return self.D.shape[1], self.X.shape[1]

    def dense(self) -> Tensor:
        """The gradient matrix itself (rows x columns); for tests and small layers."""
        return self.D.T @ self.X

    def inner(self, other: Tensor) -> Tensor:
        """``<G, other>_F`` in float64, without building ``G``. ``other``: rows x columns."""
        return ((self.D @ other.to(self.D.dtype)) * self.X).sum(dtype=torch.float64)

    def squared_norm(self) -> Tensor:
        """``||G||_F^2`` in float64 from the two token-by-token Gram matrices."""
        return ((self.D @ self.D.T) * (self.X @ self.X.T)).sum(dtype=torch.float64)


@dataclass(frozen=True)
class SafetyGradient:
    """The anchors' gradient at the current parameters.

    Attributes:
        loss: the anchor loss (nats per supervised token).
        factored: by parameter name, for linear layers and embeddings.
        dense: by parameter name, for everything else.
    """

    loss: float
    factored: dict[str, Factors] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def inner(self, name: str, gradient: Tensor) -> Tensor | None:
        """``<g_s, gradient>`` for one block in float64; None where the anchors do not reach that parameter."""
        if name in self.factored:
            return self.factored[name].inner(gradient.reshape(gradient.shape[0], -1))
        if name in self.dense:
            return torch.tensor(dot(self.dense[name], gradient), dtype=torch.float64)
        return None

    def squared_norm(self) -> float:
        """``||g_s||^2`` over all blocks."""
        total = sum((float(block.squared_norm()) for block in self.factored.values()), 0.0)
        return total + squared_norm(self.dense)


def safety_gradient(model: nn.Module, loss_of: Callable[[], Tensor]) -> SafetyGradient:
    """Gradient of a scalar loss as factors.

    Args:
        model: the module whose trainable parameters are asked for; gradients in ``.grad`` are neither read nor written.
        loss_of: runs the forward pass on ``model`` and returns the loss; called once, under ``torch.enable_grad``.

    Raises:
        GuardError: when the loss is not finite or reaches no trainable parameter.
    """
    with torch.enable_grad(), recorded(model) as record:
        return record.gradient(loss_of())


class Record:
    """What the forward hooks saw: per parameter, the (output, input) pairs of each use."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = self.names.get(id(module.weight))
        if name is not None and output.requires_grad:
            self.uses.setdefault(name, []).append((output, inputs[0].detach()))

    def gradient(self, loss: Tensor, scale: float = 1.0, retain_graph: bool = False) -> SafetyGradient:
        """Of ``scale * loss``, a scalar that came out of the recorded passes.

        Raises:
            GuardError: when the loss is not finite or reaches no trainable parameter.
        """
        if not torch.isfinite(loss):
            raise GuardError("the anchor loss is not finite", seen=float(loss.detach()), fix="lower the learning rate")
        if not loss.requires_grad:
            raise GuardError("the anchors reach no trainable parameter", fix="check requires_grad and the adapter")
        outputs = [output for uses in self.uses.values() for output, _ in uses]
        # A weight whose module was never called may have been used all the same: functionally, or in a compiled graph.
        asked = {name: p for name, p in self.parameters.items() if name not in self.uses}
        gradients = torch.autograd.grad(
            loss,
            [*outputs, *asked.values()],
            torch.full_like(loss, scale),
            allow_unused=True,
            retain_graph=retain_graph,
        )
        by_use = iter(gradients[: len(outputs)])
        factored: dict[str, Factors] = {}
        for name, uses in self.uses.items():
            pairs = [
                (gradient, seen) for (_, seen), gradient in zip(uses, by_use, strict=False) if gradient is not None
            ]
            if pairs:
                factored[name] = _stack(self.parameters[name], pairs)
        rest = zip(asked, gradients[len(outputs) :], strict=True)
        dense = {name: gradient.detach().float() for name, gradient in rest if gradient is not None}
        return SafetyGradient(loss=scale * float(loss.detach()), factored=factored, dense=dense)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Record]:
    """Inside, forward passes of ``model`` are remembered, for the gradient of a loss that comes out of them."""
    record = Record(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)) and m.weight.requires_grad]
    handles = [layer.register_forward_hook(record.hook) for layer in layers]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _stack(weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Factors:
    """Concatenate the uses of one weight along tokens; an embedding look-up is a product with one-hot rows."""
    D, X = [], []
    for gradient, seen in pairs:
        if seen.is_floating_point():  # linear: gradient (..., out), seen (..., in)
            D.append(gradient.reshape(-1, gradient.shape[-1]).float())
            X.append(seen.reshape(-1, seen.shape[-1]).float())
        else:  # embedding: gradient (..., width), seen (...) token ids
            one_hot = torch.zeros(seen.numel(), weight.shape[0], device=gradient.device)
            D.append(one_hot.scatter_(1, seen.reshape(-1, 1), 1.0))
            X.append(gradient.reshape(-1, gradient.shape[-1]).float())
    D_all, X_all = torch.cat(D).detach(), torch.cat(X).detach()
    reached = D_all.abs().amax(1).mul(X_all.abs().amax(1)) > 0  # tokens without influence add nothing: drop them
    return Factors(D=D_all[reached], X=X_all[reached])
