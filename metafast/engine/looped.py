"""The loop over tasks: what vmap cannot take, still exact.

Dropout, data-dependent control flow and layers that write to their constants see one task at a time, in order, and the
gradient goes through an ordinary autograd graph of the inner loop, which grows with the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.engine.batches import cuts, support_of
from metafast.engine.task_model import TaskModel
from metafast.rules import UpdateRule


class LoopEngine:
    """The interface of :class:`metafast.engine.vmapped.VmapEngine`, a task at a time."""

    def __init__(self, task: TaskModel, rule: UpdateRule, first_order: bool) -> None:
        self.task = task
        self.rule = rule
        self.first_order = first_order

    def path(
        self,
        theta: Tensor,
        support_x: Tensor,
        support_y: Tensor,
        wanted: Sequence[bool],
        batch: int | None = None,
        truncate: int | None = None,
    ) -> list[Tensor]:
        """phi_1..phi_K, (T, P) each, all of them: what is random in a model must lead to phi_K by way of the others."""
        starts = theta.expand(support_x.shape[0], -1)
        with self.task.policy():
            tasks = [
                self._adapt(start, x, y, len(wanted), batch, truncate)
                for start, x, y in zip(starts, support_x, support_y)
            ]
        return [torch.cat(step) for step in zip(*tasks)]

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """(T, N, ...) outputs for x (T, N, ...) with parameters (T, P); differentiable in phi."""
        split, constants = self.task.layout.split, self.task.constants()
        with self.task.policy():
            return torch.stack([self.task.forward(split(p), constants, v) for p, v in zip(phi, x)])

    def _adapt(
        self, theta: Tensor, x: Tensor, y: Tensor, steps: int, batch: int | None, truncate: int | None
    ) -> list[Tensor]:
        """(1, P) parameters after each step of one task with support x (Ns, ...), y (Ns, ...)."""
        phi = theta.unsqueeze(0)
        path = []
        state = self.rule.init(phi)
        for k in range(steps):
            if cuts(truncate, k):
                phi, state = phi.detach(), tuple(s.detach() for s in state)
            second_order = torch.is_grad_enabled() and not self.first_order
            with torch.enable_grad():
                # Without a graph to build on (no_grad, or frozen parameters) the step still needs its own gradient.
                at = phi if phi.requires_grad else phi.detach().requires_grad_()
                support = support_of(x, y, k, batch)
                loss = self.task.task_loss(self.task.layout.split(at[0]), self.task.constants(), *support)
                (grads,) = torch.autograd.grad(loss, at, create_graph=second_order)
            phi, state = self.rule.step(phi, grads, state)
            path.append(phi)
        return path
