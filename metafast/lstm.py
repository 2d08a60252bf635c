"""The coordinatewise LSTM optimiser of Andrychowicz et al. 2016 (arXiv:1606.04474)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.ops.lstm import check_range, lstm_update


class LSTMOptimizer(nn.Module):
    """A small LSTM that turns a gradient into an update, the same one for every coordinate.

    For a coordinate with gradient g and state (h_l, c_l) of layer l = 1..L:

        z_0 = (log|g| / p, sign g)   if |g| >= exp(-p),   else (-1, exp(p) g)
        i, f, m, o = split(W_l z_{l-1} + V_l h_l + b_l)
        c_l' = sigmoid(f) c_l + sigmoid(i) tanh(m),   h_l' = sigmoid(o) tanh(c_l'),   z_l = h_l'
        O(g) = w . z_L + b

    Args:
        hidden: units H of each layer, at least 1.
        layers: number of LSTM layers L, at least 1.
        p: range of the log/sign preprocessing, above 0, at most 80; gradients below exp(-p) go in linearly.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Example:
        >>> optimizer = LSTMOptimizer(hidden=20)
        >>> state = optimizer.init(3)
        >>> updates, state = optimizer(torch.tensor([0.1, -2.0, 0.0]), state)
        >>> updates.shape, state.shape
        (torch.Size([3]), torch.Size([2, 2, 3, 20]))
    """

    def __init__(self, hidden: int = 20, layers: int = 2, p: float = 10.0) -> None:
        super().__init__()
        self.hidden = _check.integer("hidden", hidden, minimum=1)
        self.layers = _check.integer("layers", layers, minimum=1)
        self.p = check_range(p)
        self.weights = nn.ParameterList()
        for layer in range(layers):
            inputs = 2 if layer == 0 else hidden
            self.weights.append(torch.empty(4 * hidden, inputs))
            self.weights.append(torch.empty(4 * hidden, hidden))
            self.weights.append(torch.empty(4 * hidden))
        self.weights.append(torch.empty(hidden))
        self.weights.append(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn.LSTM does; the output bias starts at 0."""
        bound = 1.0 / math.sqrt(self.hidden)
        for weight in self.weights:
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.weights[-1])

    def init(self, coordinates: int) -> Tensor:
        """(L, 2, N, H) zero state, [:, 0] is h and [:, 1] is c, for N coordinates."""
        zeros: Tensor = self.weights[0].new_zeros(self.layers, 2, coordinates, self.hidden)
        return zeros

    def forward(self, grads: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Updates (N,) and next state (L, 2, N, H) for gradients (N,) and state (L, 2, N, H)."""
        return lstm_update(grads, state, tuple(self.weights), p=self.p)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, layers={self.layers}, p={self.p:g}"
