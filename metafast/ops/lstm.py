"""One step of the coordinatewise LSTM optimiser (Andrychowicz et al. 2016) on a vector of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metafast import _check


def _preprocess(grads: Tensor, p: float) -> Tensor:
    """(N, 2) inputs of the LSTM for gradients (N,); both branches stay finite, also their derivatives."""
    size = grads.abs()
    large = size >= math.exp(-p)
    # The where inside keeps log and its derivative finite where the other branch is taken.
    log = torch.where(large, size, torch.ones_like(size)).log() / p
    return torch.stack(
        (
            torch.where(large, log, torch.full_like(log, -1.0)),
            torch.where(large, grads.sign(), grads * math.exp(p)),
        ),
        dim=-1,
    )


def _check_arguments(grads: Tensor, state: Tensor, weights: Sequence[Tensor], p: float) -> int:
    """Number of layers; raises where shapes, dtypes or devices do not fit."""
    _check.tensor("grads", grads)
    _check.tensor("state", state)
    _check.number("p", p, minimum=1e-6)
    if grads.dim() != 1 or not grads.is_floating_point():
        raise ValueError(f"grads: expected a floating tensor of shape (N,), got {_check.describe(grads)}")
    count = len(weights)
    if count < 5 or count % 3 != 2:
        raise ValueError(f"weights: expected 3 tensors a layer (inputs, hidden, bias) and 2 of the output, got {count}")
    layers = count // 3
    for index, weight in enumerate(weights):
        _check.tensor(f"weights[{index}]", weight)
        _check.like(f"weights[{index}]", weight, dtype=grads.dtype, device=grads.device, owner="grads")
    hidden = weights[-2].shape[0] if weights[-2].dim() == 1 else -1
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        shapes += [(4 * hidden, 2 if layer == 0 else hidden), (4 * hidden, hidden), (4 * hidden,)]
    shapes += [(hidden,), ()]
    for index, (weight, shape) in enumerate(zip(weights, shapes)):
        if tuple(weight.shape) != shape:
            raise ValueError(f"weights[{index}]: expected shape {shape}, got {_check.describe(weight)}")
    wanted = (layers, 2, grads.shape[0], hidden)
    if tuple(state.shape) != wanted:
        raise ValueError(f"state: expected shape {wanted} (L, 2, N, H), got {_check.describe(state)}")
    _check.like("state", state, dtype=grads.dtype, device=grads.device, owner="grads")
    return layers


def lstm_update(grads: Tensor, state: Tensor, weights: Sequence[Tensor], *, p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Updates and next state of the coordinatewise LSTM; differentiable in all its tensors.

    The equations stand in :class:`metafast.LSTMOptimizer`.

    Args:
        grads: (N,) gradients, a coordinate each.
        state: (L, 2, N, H), [l, 0] the hidden and [l, 1] the cell state of layer l.
        weights: for each layer (4H, inputs), (4H, H), (4H,) in gate order i, f, m, o; then (H,) and () of the output.
        p: range of the log/sign preprocessing.

    Returns:
        (N,) updates and the (L, 2, N, H) state after the step; ``state`` itself is not changed.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named by argument.

    Example:
        >>> import metafast as mf
        >>> optimizer = mf.LSTMOptimizer(hidden=4)
        >>> updates, state = mf.ops.lstm_update(torch.ones(3), optimizer.init(3), list(optimizer.weights))
        >>> updates.shape
        torch.Size([3])
    """
    layers = _check_arguments(grads, state, weights, p)
    z = _preprocess(grads, p)
    carried = []
    for layer in range(layers):
        w_input, w_hidden, bias = weights[3 * layer : 3 * layer + 3]
        h, c = state[layer]
        gates = torch.addmm(bias, z, w_input.t()) + h @ w_hidden.t()
        i, f, m, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * m.tanh()
        z = o.sigmoid() * c.tanh()
        carried.append(torch.stack((z, c)))
    return z @ weights[-2] + weights[-1], torch.stack(carried)
