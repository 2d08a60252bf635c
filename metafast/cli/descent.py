"""A start for the learned optimiser: it begins as gradient descent, and meta-learning improves on that.

From random weights it takes hundreds of meta-steps to find out which way is down, and the initialisation cannot
learn much meanwhile.
"""

from __future__ import annotations

import math

import torch

from metafast.lstm import LSTMOptimizer

_OPEN = 3.0  # sigmoid(3) = 0.95: open, but not so far that no gradient comes through
_SIGN = 2.0  # tanh(2) = 0.96
_SMALL = 1e-3


@torch.no_grad()
def start_as_descent(optimizer: LSTMOptimizer, limit: float = 1.0) -> LSTMOptimizer:
    """Set one unit of each layer so that O(g) is g for small gradients and levels off towards +-limit; in place.

    The optimiser sees (log|g| / p, sign g). With an input gate of weight p on the first and a candidate that sees the
    second, unit 0 of the first layer holds sigmoid(log(|g| / limit)) tanh(2 sign g), nearly g / (limit + |g|); the
    layers above pass it on; forget gates are closed. The other units keep their random weights but not their say in
    the output, which meta-learning gives them.

    Args:
        optimizer: an optimiser of any size.
        limit: the gradient at which updates are about half of it.

    Returns:
        The same optimiser.

    Example:
        >>> optimizer = start_as_descent(LSTMOptimizer())
        >>> updates, _ = optimizer(torch.tensor([1e-3, -1e-2, 1.0]), optimizer.init(3))
        >>> [round(update, 4) for update in updates.tolist()]
        [0.001, -0.0099, 0.4184]
    """
    hidden = optimizer.hidden
    input_gate, forget_gate, candidate, output_gate = (k * hidden for k in range(4))
    for layer in range(optimizer.layers):
        weight, recurrent, bias = (optimizer.weights[3 * layer + k] for k in range(3))
        for row in (input_gate, forget_gate, candidate, output_gate):
            weight[row] = 0.0
            recurrent[row] = 0.0
            bias[row] = 0.0
        bias[forget_gate], bias[output_gate] = -_OPEN, _OPEN
        if layer == 0:
            weight[input_gate, 0], weight[candidate, 1] = optimizer.p, _SIGN
            bias[input_gate] = -math.log(limit)
        else:
            bias[input_gate], weight[candidate, 0] = _OPEN, 1.0
    output, shift = optimizer.weights[-2], optimizer.weights[-1]
    shift.zero_()
    output.zero_()
    output[0] = 1.0
    probe = output.new_tensor([_SMALL * limit])
    update, _ = optimizer(probe, optimizer.init(1))
    output[0] = float(probe / update)
    return optimizer
