"""A coordinatewise multi-layer perceptron as a learned optimiser, the smaller sibling of the LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.ops.lstm import check_range, preprocess


class MLPOptimizer(CoordinatewiseOptimizer):
    """A small perceptron that turns a gradient, and running means of gradients, into an update for every coordinate.

        m_d' = beta_d m_d + (1 - beta_d) g,  d = 1..D, from m_d = 0
        z_0 = (pre(g), pre(m_1'), ..., pre(m_D'))     pre: LSTMOptimizer's log/sign preprocessing, two numbers each
        z_l = tanh(W_l z_{l-1} + b_l),  l = 1..L
        O(g) = w . z_L + b

    Args:
        hidden: units of each layer, at least 1.
        layers: number of hidden layers L, at least 1.
        momenta: beta_1..beta_D, each at least 0 and below 1; none by default: then it has no memory.
        p: range of the preprocessing, above 0, at most 80.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Example:
        >>> optimizer = MLPOptimizer(hidden=8, momenta=(0.9,))
        >>> updates, state = optimizer(torch.tensor([0.1, -2.0, 0.0]), optimizer.init(3))
        >>> updates.shape, state.shape
        (torch.Size([3]), torch.Size([1, 3]))

    Reference: after Metz et al. 2019, arXiv:1810.10180.
    """

    def __init__(self, hidden: int = 20, layers: int = 2, momenta: Sequence[float] = (), p: float = 10.0) -> None:
        super().__init__()
        _check.integer("hidden", hidden, minimum=1)
        _check.integer("layers", layers, minimum=1)
        if isinstance(momenta, str) or not isinstance(momenta, Sequence):
            raise TypeError(f"momenta: expected numbers below 1, got {_check.describe(momenta)}")
        for beta in momenta:
            if _check.number("momenta", beta, minimum=0.0) >= 1:
                raise ValueError(f"momenta: expected numbers below 1, got {beta}")
        self.momenta = tuple(float(beta) for beta in momenta)
        self.p = check_range(p)
        sizes = [2 * (1 + len(self.momenta)), *[hidden] * layers]
        parts = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*parts)
        self.output = nn.Linear(hidden, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn.Linear does; the output bias starts at 0."""
        for layer in (*self.net, self.output):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.zeros_(self.output.bias)

    def init(self, coordinates: int) -> Tensor:
        """(D, N) running means, zero, for N coordinates."""
        zeros: Tensor = self.output.weight.new_zeros(len(self.momenta), coordinates)
        return zeros

    def forward(self, grads: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Updates (N,) and next state (D, N) for gradients (N,) and state (D, N).

        Raises:
            TypeError, ValueError: other shapes.
        """
        if _check.tensor("grads", grads).dim() != 1:
            raise ValueError(f"grads: expected shape (N,), got {_check.describe(grads)}")
        wanted = (len(self.momenta), grads.shape[0])
        if tuple(_check.tensor("state", state).shape) != wanted:
            raise ValueError(f"state: expected shape {wanted} (D, N), got {_check.describe(state)}")
        if self.momenta:
            decays = grads.new_tensor(self.momenta).unsqueeze(1)
            state = decays * state + (1 - decays) * grads
        seen = [preprocess(g, self.p) for g in (grads, *state)]
        updates: Tensor = self.output(self.net(torch.cat(seen, dim=-1))).squeeze(-1)
        return updates, state

    def extra_repr(self) -> str:
        return f"momenta={self.momenta}, p={self.p:g}"
