"""The `torch` engine: all tasks in one call, exact, any module that vmap can take.

vmap is always the outermost transform, vmap(grad(task)) and vmap(vjp(grad(task))): the other order, grad(vmap(task)),
gives wrong second derivatives through torch's batching rules of batch and layer norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import grad, vjp, vmap

from metafast.engine.adjoint import AdjointEngine
from metafast.engine.task_model import Params, TaskModel
from metafast.engine.traced import Traced
from metafast.rules import UpdateRule


class VmapEngine(AdjointEngine):
    """The four functions with ``torch.func``."""

    def __init__(self, task: TaskModel, rule: UpdateRule, first_order: bool) -> None:
        super().__init__(task, rule, first_order)
        self._support_grad = Traced(_Batched(task, _gradient, (0, None, 0, 0), joined=True), task.fingerprint)
        self._hvp = Traced(_Batched(task, _hessian_vector, (0, None, 0, 0, 0), joined=True), task.fingerprint)
        self._outputs = Traced(_Batched(task, _outputs, (0, None, 0), joined=False), task.fingerprint)
        self._pullback = Traced(_Batched(task, _pullback, (0, None, 0, 0), joined=True), task.fingerprint)

    def support_grad(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(T, P) gradients of the support losses at phi (T, P)."""
        return self._support_grad(self.task.layout.split(phi), self.task.constants(), x, y)

    def hvp(self, phi: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """(T, P) products of the support losses' Hessians at phi (T, P) with vectors (T, P)."""
        split = self.task.layout.split
        return self._hvp(split(phi), self.task.constants(), x, y, split(vector))

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """(T, N, ...) outputs, outside of autograd."""
        return self._outputs(self.task.layout.split(phi), self.task.constants(), x)

    def pullback(self, phi: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        """(T, P) cotangents of phi for those of the outputs, (T, N, ...)."""
        return self._pullback(self.task.layout.split(phi), self.task.constants(), x, cotangent)


def _gradient(task: TaskModel, params: Params, constants: Params, x: Tensor, y: Tensor) -> Params:
    gradient: Params = grad(task.task_loss)(params, constants, x, y)
    return gradient


def _hessian_vector(task: TaskModel, params: Params, constants: Params, x: Tensor, y: Tensor, vector: Params) -> Params:
    # Reverse over reverse, H being symmetric: many operations have no forward derivative of their backward.
    pull = vjp(lambda p: _gradient(task, p, constants, x, y), params)[1]
    product: Params = pull(vector)[0]
    return product


def _outputs(task: TaskModel, params: Params, constants: Params, x: Tensor) -> Tensor:
    return task.forward(params, constants, x)


def _pullback(task: TaskModel, params: Params, constants: Params, x: Tensor, cotangent: Tensor) -> Params:
    pull = vjp(lambda p: task.forward(p, constants, x), params)[1]
    result: Params = pull(cotangent)[0]
    return result


@dataclass(frozen=True)
class _Batched:
    """A function of one task, over all of them; ``joined`` makes one (T, P) of a result by parameter."""

    task: TaskModel
    function: Callable[..., Any]
    in_dims: tuple[int | None, ...]
    joined: bool

    def __call__(self, *arguments: Tensor | Params) -> Tensor:
        with self.task.policy():
            result = vmap(partial(self.function, self.task), in_dims=self.in_dims)(*arguments)
        whole: Tensor = self.task.layout.join(result) if self.joined else result
        return whole
