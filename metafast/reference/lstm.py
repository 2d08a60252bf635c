"""The coordinatewise learned optimisers, written from their equations: the LSTM one gate at a time, the perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lstm_step(grads: Tensor, state: Tensor, weights: Sequence[Tensor], p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Updates (N,) and next state (L, 2, N, H) for grads (N,), state (L, 2, N, H) and weights as in LSTMOptimizer."""
    z = _preprocess(grads, p)
    next_state = []
    for layer in range(state.shape[0]):
        w_input, w_hidden, bias = weights[3 * layer], weights[3 * layer + 1], weights[3 * layer + 2]
        h, c = state[layer, 0], state[layer, 1]
        size = h.shape[1]
        gates = z @ w_input.T + h @ w_hidden.T + bias
        gate_in = torch.sigmoid(gates[:, 0 * size : 1 * size])
        gate_forget = torch.sigmoid(gates[:, 1 * size : 2 * size])
        candidate = torch.tanh(gates[:, 2 * size : 3 * size])
        gate_out = torch.sigmoid(gates[:, 3 * size : 4 * size])
        c = gate_forget * c + gate_in * candidate
        h = gate_out * torch.tanh(c)
        next_state.append(torch.stack([h, c]))
        z = h
    return (z * weights[-2]).sum(1) + weights[-1], torch.stack(next_state)


def mlp_step(
    grads: Tensor,
    state: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    momenta: Sequence[float] = (),
    p: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Updates (N,) and next state (D, N) for grads (N,), state (D, N) and MLPOptimizer's (W_l, b_l), at last (w, b)."""
    means = [beta * mean + (1 - beta) * grads for beta, mean in zip(momenta, state)]
    z = torch.cat([_preprocess(g, p) for g in (grads, *means)], dim=1)
    for weight, bias in layers[:-1]:
        z = torch.tanh(z @ weight.T + bias)
    weight, bias = layers[-1]
    return (z @ weight.T + bias)[:, 0], torch.stack(means) if means else state


def _preprocess(grads: Tensor, p: float) -> Tensor:
    """(N, 2): logarithm and sign, or -1 and the scaled gradient where it is small."""
    large = grads.abs() >= math.exp(-p)
    # Masked values stand in for those of the other branch: 0 * inf would be NaN in a derivative.
    logarithm = torch.log(torch.where(large, grads.abs(), 1.0)) / p
    first = torch.where(large, logarithm, torch.tensor(-1.0, dtype=grads.dtype, device=grads.device))
    second = torch.where(large, torch.sign(grads), math.exp(p) * grads)
    return torch.stack([first, second], dim=1)
