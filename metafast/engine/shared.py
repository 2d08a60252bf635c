"""One module, the same weights for every task: embeddings of episodes, each with its own batch statistics."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import vmap

from metafast.engine.autocast import autocast_state
from metafast.engine.networks import NativeNetwork
from metafast.engine.select import warn_of_loop
from metafast.engine.task_model import TaskModel


class SharedForward:
    """x (T, N, ...) -> outputs (T, N, ...) with shared weights theta, differentiable once in theta."""

    def __init__(self, task: TaskModel) -> None:
        self.task = task
        self._obstacles: dict[tuple[Hashable, ...], str | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        theta = self.task.theta()
        network = self.task.native(x)
        if network is not None:
            embedded: Tensor = _Native.apply(network, theta, x)
            return embedded
        mode = (*self.task.mode(), *autocast_state(x.device))
        if mode not in self._obstacles:
            self._obstacles[mode] = self._obstacle(theta.detach(), x[:1])
            warn_of_loop(self.task, self._obstacles[mode])
            if self._obstacles[mode] is None:
                self.task.native.warn(x)
        if self._obstacles[mode] is None:
            outputs: Tensor = _Shared.apply(self.task, theta, x)
            return outputs
        with self.task.policy():
            params = self.task.layout.split(theta)
            return torch.stack([self.task.forward(params, self.task.constants(), v) for v in x])

    def _obstacle(self, theta: Tensor, x: Tensor) -> str | None:
        """Why vmap cannot take the forward; None if it can."""
        devices = [x.device] if x.device.type == "cuda" else []
        with self.task.policy(), torch.no_grad(), torch.random.fork_rng(devices=devices):
            try:
                vmap(self.task.forward, in_dims=(None, None, 0))(
                    self.task.layout.split(theta), self.task.constants(), x
                )
            except RuntimeError as error:
                return str(error).strip().splitlines()[0]
        return None


class _Native(torch.autograd.Function):
    """theta (P,), x -> outputs (T, N, D) by the extension."""

    @staticmethod
    def forward(ctx: Any, network: NativeNetwork, theta: Tensor, x: Tensor) -> Tensor:
        ctx.network = network
        ctx.save_for_backward(theta, x)
        outputs: Tensor = network.engine.outputs(theta, network.constants(), x)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        theta, x = ctx.saved_tensors
        return None, ctx.network.engine.pullback(theta, ctx.network.constants(), x, cotangent).sum(0), None


class _Shared(torch.autograd.Function):
    """theta (P,), x -> outputs (T, N, ...). The graph under vmap is exact for first derivatives, which is all that
    once_differentiable lets through: second ones through torch's batching rules of the norms would be wrong."""

    @staticmethod
    def forward(ctx: Any, task: TaskModel, theta: Tensor, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(theta.requires_grad), task.policy():
            theta = theta.detach().requires_grad_(theta.requires_grad)
            outputs: Tensor = vmap(task.forward, in_dims=(None, None, 0))(task.layout.split(theta), task.constants(), x)
        ctx.theta, ctx.outputs = theta, outputs
        return outputs.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = torch.autograd.grad(ctx.outputs, ctx.theta, cotangent, retain_graph=True)
        return None, gradient, None
