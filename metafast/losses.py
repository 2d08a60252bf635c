"""Losses of one task: a name the kernels know, or any callable.

cross_entropy   -mean_n log softmax(f_n)[y_n]
mse             mean over all elements of (f - y)^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast import _check

LossFunction = Callable[[Tensor, Tensor], Tensor]
LossSpec = str | LossFunction


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, C) and int64 labels (N,)."""
    return F.cross_entropy(logits, labels)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of outputs (N, ...) and targets (N, ...)."""
    # Not F.mse_loss: it has no forward derivative of its backward, so jvp(grad) of it fails.
    return ((outputs - targets) ** 2).mean()


NAMED: dict[str, LossFunction] = {"cross_entropy": cross_entropy, "mse": mse}


@dataclass(frozen=True)
class Loss:
    """A loss of one task, ``function(outputs (N, ...), targets (N, ...)) -> scalar``, with its name."""

    name: str
    function: LossFunction

    @property
    def named(self) -> bool:
        """Whether it is one of the losses above, not a callable of the user's."""
        return self.function is NAMED.get(self.name)

    def per_task(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(T,) losses of outputs (T, N, ...) and targets (T, N, ...); differentiable in the outputs."""
        if self.name == "cross_entropy":
            tasks, samples = targets.shape
            flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            return flat.view(tasks, samples).mean(1)
        if self.name == "mse":
            return ((outputs - targets) ** 2).flatten(1).mean(1)
        return torch.stack([self.function(f, y) for f, y in zip(outputs, targets)])

    def check(self, x_name: str, y_name: str, y: Tensor, outputs: torch.Size) -> None:
        """Refuse targets that do not fit the model's outputs, given the outputs' shape for one task."""
        if self.name == "cross_entropy":
            if y.dtype != torch.int64:
                raise TypeError(f"{y_name}: cross_entropy expects int64 labels, got {_check.describe(y)}")
            if len(outputs) != 2:
                raise ValueError(
                    f"{x_name}: cross_entropy expects the model to give (N, classes) for a task, got {tuple(outputs)}"
                )
            if int(y.max()) >= outputs[1]:
                raise ValueError(
                    f"{y_name}: expected labels below {outputs[1]}, the model's outputs, got {int(y.max())}"
                )
        elif self.name == "mse":
            if not y.is_floating_point():
                raise TypeError(f"{y_name}: mse expects floating targets, got {_check.describe(y)}")
            if y.shape[2:] != outputs[1:]:
                raise ValueError(
                    f"{y_name}: expected samples of shape {tuple(outputs[1:])} like the model's outputs, "
                    f"got {_check.describe(y)}"
                )


def resolve_loss(loss: LossSpec) -> Loss:
    """The :class:`Loss` of a name or callable.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(loss, str):
        return Loss(_check.choice("loss", loss, NAMED), NAMED[loss])
    if not callable(loss):
        raise TypeError(
            f"loss: expected a name or a callable (outputs, targets) -> scalar, got {_check.describe(loss)}"
        )
    return Loss(getattr(loss, "__name__", type(loss).__name__) + " (callable)", loss)
