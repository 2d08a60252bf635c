"""Learned optimisers O that see one coordinate's gradient at a time, and their use as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from metafast import _check


class CoordinatewiseOptimizer(nn.Module, ABC):
    """u, s' = O(g, s; psi), the same for every coordinate; one that was learned on a net steps any other.

    A pure pair (init, forward): the state goes in and comes back. :class:`metafast.LSTMOptimizer` and
    :class:`metafast.MLPOptimizer` are such; for your own define the two with differentiable torch operations.

    Example:
        >>> class Sign(CoordinatewiseOptimizer):
        ...     def init(self, coordinates):
        ...         return torch.zeros(0, coordinates)
        ...     def forward(self, grads, state):
        ...         return grads.sign(), state
        >>> theta = torch.ones(2, requires_grad=True)
        >>> theta.grad = torch.tensor([3.0, -4.0])
        >>> Sign().as_torch([theta], lr=0.5).step()
        >>> theta
        tensor([0.5000, 1.5000], requires_grad=True)
    """

    @abstractmethod
    def init(self, coordinates: int) -> Tensor:
        """State before the first step for N coordinates; differentiable in psi if it is learned."""

    @abstractmethod
    def forward(self, grads: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Updates (N,) and next state for gradients (N,) and a state."""

    def as_torch(self, params: ParamsT, lr: float = 0.1) -> TorchOptimizer:
        """This optimiser as a ``torch.optim.Optimizer`` of any tensors: p <- p - lr O(p.grad, s), s' kept for each.

        Args:
            params: tensors, or groups of them with their own ``lr``, of this optimiser's dtype and device.
            lr: factor of the output, at least 0: the one it was trained with, which for LOMAML is its ``lr``.

        Returns:
            :class:`TorchOptimizer`; it uses this module's weights as they are at each step, without gradients.

        Raises:
            TypeError, ValueError: tensors of another dtype or device, or a rate out of range.

        Example:
            >>> import metafast as mf
            >>> net = nn.Linear(3, 1)
            >>> optimizer = mf.LSTMOptimizer().start_as_descent().as_torch(net.parameters(), lr=0.1)
            >>> net(torch.ones(4, 3)).square().mean().backward()
            >>> optimizer.step()
        """
        return TorchOptimizer(self, params, lr)


class TorchOptimizer(Optimizer):
    """What :meth:`CoordinatewiseOptimizer.as_torch` makes.

    ``state_dict()`` holds the rates and each tensor's state; psi is in ``learned.state_dict()``.

    Attributes:
        learned: the learned optimiser.
    """

    def __init__(self, learned: CoordinatewiseOptimizer, params: ParamsT, lr: float) -> None:
        self.learned = learned
        super().__init__(params, {"lr": _check.number("lr", lr, minimum=0.0)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tensors, {"params": tensors, "lr": their rate if it is not the first one's}."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check.number("lr", group["lr"], minimum=0.0)
            like = next(self.learned.parameters(), None)
            for p in group["params"]:
                if like is not None:
                    _check.like("params", p, dtype=like.dtype, device=like.device, owner="the learned optimiser")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the tensors' ``.grad``; those without one stay. Returns the closure's loss.

        Raises:
            TypeError: a sparse gradient, before any tensor is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in moving:
            if p.grad.layout != torch.strided:
                raise TypeError(f"params: expected dense gradients, got one of layout {p.grad.layout}")
        for p, lr in moving:
            kept = self.state[p]
            state = kept["state"] if kept else self.learned.init(p.numel())
            updates, kept["state"] = self.learned(p.grad.reshape(-1), state)
            p.sub_(updates.view_as(p), alpha=lr)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # torch's leaves out what a subclass adds.
        return {**super().__getstate__(), "learned": self.learned}
