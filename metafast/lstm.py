"""The coordinatewise LSTM optimiser of Andrychowicz et al. 2016 (arXiv:1606.04474)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.ops.lstm import check_range, lstm_update

_OPEN = 3.0  # sigmoid(3) = 0.95: open, but not so far that no gradient comes through
_SIGN = 2.0  # tanh(2) = 0.96
_SMALL = 1e-3


class LSTMOptimizer(CoordinatewiseOptimizer):
    """A small LSTM that turns a gradient into an update, the same one for every coordinate.

    For a coordinate with gradient g and state (h_l, c_l) of layer l = 1..L:

        z_0 = (log|g| / p, sign g)   if |g| >= exp(-p),   else (-1, exp(p) g)
        i, f, m, o = split(W_l z_{l-1} + V_l h_l + b_l)
        c_l' = sigmoid(f) c_l + sigmoid(i) tanh(m),   h_l' = sigmoid(o) tanh(c_l'),   z_l = h_l'
        O(g) = w . z_L + b

    The factor that Andrychowicz et al. put on the output is the ``lr`` of what steps by O: of :class:`metafast.LOMAML`
    and of :meth:`as_torch`.

    Args:
        hidden: units H of each layer, at least 1.
        layers: number of LSTM layers L, at least 1.
        p: range of the log/sign preprocessing, above 0, at most 80; gradients below exp(-p) go in linearly.
        learn_state: whether the state before the first step is learned, one for all coordinates; else it is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Attributes:
        weights: for each layer W (4H, inputs), V (4H, H) and b (4H,), then w (H,) and b () of the output.
        initial_state: (L, 2, H), [:, 0] is h and [:, 1] is c, from 0; None without ``learn_state``.

    Example:
        >>> optimizer = LSTMOptimizer(hidden=20)
        >>> state = optimizer.init(3)
        >>> updates, state = optimizer(torch.tensor([0.1, -2.0, 0.0]), state)
        >>> updates.shape, state.shape
        (torch.Size([3]), torch.Size([2, 2, 3, 20]))
    """

    def __init__(self, hidden: int = 20, layers: int = 2, p: float = 10.0, learn_state: bool = False) -> None:
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
        learned = _check.flag("learn_state", learn_state)
        self.initial_state = nn.Parameter(torch.empty(layers, 2, hidden)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn.LSTM does; output bias and state start at 0."""
        bound = 1.0 / math.sqrt(self.hidden)
        for weight in self.weights:
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.weights[-1])
        if self.initial_state is not None:
            nn.init.zeros_(self.initial_state)

    @torch.no_grad()
    def start_as_descent(self, limit: float = 1.0) -> LSTMOptimizer:
        """Set one unit of each layer so that O(g) is g for small gradients and levels off towards +-limit; in place.

        From random weights it takes hundreds of meta-steps to find out which way is down, and an initialisation cannot
        learn much meanwhile.

        The optimiser sees (log|g| / p, sign g). With an input gate of weight p on the first and a candidate that sees
        the second, unit 0 of the first layer holds sigmoid(log(|g| / limit)) tanh(2 sign g), nearly
        g / (limit + |g|); the layers above pass it on; forget gates are closed. The other units keep their random
        weights but not their say in the output, which meta-learning gives them.

        Args:
            limit: the gradient at which updates are about half of it, above 0.

        Returns:
            The same optimiser.

        Raises:
            TypeError, ValueError: a limit of the wrong kind or out of range.

        Example:
            >>> optimizer = LSTMOptimizer().start_as_descent()
            >>> updates, _ = optimizer(torch.tensor([1e-3, -1e-2, 1.0]), optimizer.init(3))
            >>> [round(update, 4) for update in updates.tolist()]
            [0.001, -0.0099, 0.4184]
        """
        if _check.number("limit", limit, minimum=0.0) == 0:
            raise ValueError(f"limit: expected a number above 0, got {limit}")
        hidden = self.hidden
        input_gate, forget_gate, candidate, output_gate = (k * hidden for k in range(4))
        for layer in range(self.layers):
            weight, recurrent, bias = (self.weights[3 * layer + k] for k in range(3))
            for row in (input_gate, forget_gate, candidate, output_gate):
                weight[row] = 0.0
                recurrent[row] = 0.0
                bias[row] = 0.0
            bias[forget_gate], bias[output_gate] = -_OPEN, _OPEN
            if layer == 0:
                weight[input_gate, 0], weight[candidate, 1] = self.p, _SIGN
                bias[input_gate] = -math.log(limit)
            else:
                bias[input_gate], weight[candidate, 0] = _OPEN, 1.0
        if self.initial_state is not None:
            self.initial_state.zero_()
        output, shift = self.weights[-2], self.weights[-1]
        shift.zero_()
        output.zero_()
        output[0] = 1.0
        probe = output.new_tensor([_SMALL * limit])
        update, _ = self(probe, self.init(1))
        output[0] = float(probe / update)
        return self

    def init(self, coordinates: int) -> Tensor:
        """(L, 2, N, H) state before the first step, [:, 0] is h and [:, 1] is c, for N coordinates."""
        if self.initial_state is not None:
            return self.initial_state.unsqueeze(2).expand(-1, -1, coordinates, -1)
        zeros: Tensor = self.weights[0].new_zeros(self.layers, 2, coordinates, self.hidden)
        return zeros

    def forward(self, grads: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Updates (N,) and next state (L, 2, N, H) for gradients (N,) and state (L, 2, N, H)."""
        return lstm_update(grads, state, tuple(self.weights), p=self.p)

    def extra_repr(self) -> str:
        learned = ", learn_state=True" if self.initial_state is not None else ""
        return f"hidden={self.hidden}, layers={self.layers}, p={self.p:g}{learned}"
