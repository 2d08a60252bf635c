"""Update rules U of the inner loop: phi_{k+1}, s_{k+1} = U(phi_k, g_k, s_k; psi).

A rule is a pure pair (init, step): state goes in and comes back, nothing is kept in the module but psi, its own
learnable parameters. Rules see all tasks at once, one flat parameter vector a row, (T, P).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from metafast import _check
from metafast.lstm import LSTMOptimizer
from metafast.ops.inner_update import inner_update

State = tuple[Tensor, ...]


class UpdateRule(nn.Module, ABC):
    """An update rule; write your own by defining the two methods with differentiable torch operations.

    Example:
        >>> import torch
        >>> class SignDescent(UpdateRule):
        ...     def init(self, params):
        ...         return ()
        ...     def step(self, params, grads, state):
        ...         return params - 0.01 * grads.sign(), state
        >>> phi, state = SignDescent().step(torch.ones(1, 2), torch.tensor([[3.0, -4.0]]), ())
        >>> phi
        tensor([[0.9900, 1.0100]])
    """

    @abstractmethod
    def init(self, params: Tensor) -> State:
        """State before the first step, for parameters (T, P); may depend on psi."""

    @abstractmethod
    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        """Parameters (T, P) and state after a step along grads (T, P)."""


class SGD(UpdateRule):
    """phi - lr g: the rule of MAML (Finn, Abbeel & Levine 2017).

    Args:
        lr: inner learning rate, a finite number of at least 0.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = _check.number("lr", lr, minimum=0.0)

    def init(self, params: Tensor) -> State:
        return ()

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        return inner_update(params, grads, self.lr), state

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}"


class LearnedRule(UpdateRule):
    """phi - lr O(g, s; psi): the rule of LOMAML, O a coordinatewise :class:`~metafast.LSTMOptimizer`.

    Args:
        optimizer: O; shared by all coordinates, tasks and steps.
        lr: factor of its output, a finite number of at least 0.
    """

    def __init__(self, optimizer: LSTMOptimizer, lr: float) -> None:
        super().__init__()
        if not isinstance(optimizer, LSTMOptimizer):
            raise TypeError(f"optimizer: expected an LSTMOptimizer, got {_check.describe(optimizer)}")
        self.optimizer = optimizer
        self.lr = _check.number("lr", lr, minimum=0.0)

    def init(self, params: Tensor) -> State:
        return (self.optimizer.init(params.numel()),)

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        updates, carried = self.optimizer(grads.reshape(-1), state[0])
        return inner_update(params, updates.view_as(params), self.lr), (carried,)

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}"
