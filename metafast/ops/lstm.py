"""One step of the coordinatewise LSTM optimiser (Andrychowicz et al. 2016) on a vector of gradients.

From the public function to the loop: :func:`lstm_update` here (checks, with the user's names) -> csrc/torch/lstm.cpp ->
csrc/cpu/lstm_kernel.h or csrc/cuda/lstm.cuh. Without kernels for the tensors at hand: :func:`_twin`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafast import _check, _native

_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
_LIBRARY.define("lstm_update(Tensor grads, Tensor state, Tensor[] weights, float p) -> (Tensor, Tensor)")
_LIBRARY.define(
    "lstm_update_backward(Tensor? d_updates, Tensor? d_next, Tensor grads, Tensor state, Tensor[] weights, float p,"
    " bool wants_state=True) -> (Tensor, Tensor, Tensor)"
)
_KERNELS = ("cpu", "simt", "cuda")
MOST_LAYERS = 8  # of the kernels, csrc/lstm.h


def preprocess(grads: Tensor, p: float) -> Tensor:
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


def check_range(p: float) -> float:
    """p, the range of the preprocessing; beyond 80 the factor exp(p) is no float32."""
    if _check.number("p", p, minimum=1e-6) > 80:
        raise ValueError(f"p: expected at most 80, got {p:g}")
    return float(p)


def _check_arguments(grads: Tensor, state: Tensor, weights: Sequence[Tensor], p: float) -> None:
    """Raises where shapes, dtypes or devices do not fit."""
    _check.tensor("grads", grads)
    _check.tensor("state", state)
    check_range(p)
    if not isinstance(weights, (Sequence, torch.nn.ParameterList)):
        raise TypeError(f"weights: expected a sequence of tensors, got {_check.describe(weights)}")
    if grads.dim() not in (1, 2) or not grads.is_floating_point() or grads.shape[:-1] == (0,):
        raise ValueError(f"grads: expected a floating tensor of shape (N,) or (K, N), got {_check.describe(grads)}")
    count = len(weights)
    if count < 5 or count % 3 != 2:
        raise ValueError(f"weights: expected 3 tensors a layer (inputs, hidden, bias) and 2 of the output, got {count}")
    layers = count // 3
    for index, weight in enumerate(weights):
        _check.tensor(f"weights[{index}]", weight)
        _check.like(f"weights[{index}]", weight, dtype=grads.dtype, device=grads.device, owner="grads")
    if weights[-2].dim() != 1 or weights[-2].numel() == 0:
        raise ValueError(f"weights[{count - 2}]: expected shape (H,), H at least 1, got {_check.describe(weights[-2])}")
    hidden = weights[-2].shape[0]
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        shapes += [(4 * hidden, 2 if layer == 0 else hidden), (4 * hidden, hidden), (4 * hidden,)]
    shapes += [(hidden,), ()]
    for index, (weight, shape) in enumerate(zip(weights, shapes)):
        if tuple(weight.shape) != shape:
            raise ValueError(f"weights[{index}]: expected shape {shape}, got {_check.describe(weight)}")
    wanted = (layers, 2, grads.shape[-1], hidden)
    if tuple(state.shape) != wanted:
        raise ValueError(f"state: expected shape {wanted} (L, 2, N, H), got {_check.describe(state)}")
    _check.like("state", state, dtype=grads.dtype, device=grads.device, owner="grads")


def lstm_update(grads: Tensor, state: Tensor, weights: Sequence[Tensor], *, p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Updates and next state of the coordinatewise LSTM; differentiable in all its tensors.

    The equations stand in :class:`metafast.LSTMOptimizer`. K steps at once are those of K calls, each from the state
    that the one before left; the CPU's kernels keep a block of coordinates in the cache through all of them.

    Args:
        grads: (N,) gradients, a coordinate each, or (K, N) for K steps, at least one.
        state: (L, 2, N, H), [l, 0] the hidden and [l, 1] the cell state of layer l.
        weights: for each layer (4H, inputs), (4H, H), (4H,) in gate order i, f, m, o; then (H,) and () of the output.
        p: range of the log/sign preprocessing.

    Returns:
        Updates like ``grads`` and the (L, 2, N, H) state after the last step; ``state`` itself is not changed.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named by argument.

    Example:
        >>> import metafast as mf
        >>> optimizer = mf.LSTMOptimizer(hidden=4)
        >>> updates, state = mf.ops.lstm_update(torch.ones(3), optimizer.init(3), list(optimizer.weights))
        >>> updates.shape
        torch.Size([3])
    """
    _check_arguments(grads, state, weights, p)
    if _runs(grads, state, *weights):
        updates, carried = torch.ops.metafast.lstm_update(grads, state, list(weights), p)
        return updates, carried
    return _twin(grads, state, list(weights), p)


def _runs(grads: Tensor, state: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take a call: several steps at once are the CPU's alone."""
    layers = state.shape[0]
    obstacle = f"its kernels take up to {MOST_LAYERS} layers, got {layers}" if layers > MOST_LAYERS else None
    kernels = _KERNELS if grads.dim() == 1 else ("cpu",)
    return _native.runs("grads", grads, state, *others, kernels=kernels, obstacle=obstacle)


def _twin(grads: Tensor, state: Tensor, weights: list[Tensor], p: float) -> tuple[Tensor, Tensor]:
    """The operator in PyTorch's own operations."""
    if grads.dim() == 2:
        steps = []
        for row in grads:
            updates, state = _twin(row, state, weights, p)
            steps.append(updates)
        return torch.stack(steps), state
    z = preprocess(grads, p)
    carried = []
    for layer in range(state.shape[0]):
        w_input, w_hidden, bias = weights[3 * layer : 3 * layer + 3]
        h, c = state[layer]
        gates = torch.addmm(bias, z, w_input.t()) + h @ w_hidden.t()
        i, f, m, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * m.tanh()
        z = o.sigmoid() * c.tanh()
        carried.append(torch.stack((z, c)))
    return z @ weights[-2] + weights[-1], torch.stack(carried)


def _twin_backward(
    d_updates: Tensor | None,
    d_next: Tensor | None,
    grads: Tensor,
    state: Tensor,
    weights: list[Tensor],
    p: float,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of grads, of state (where it is wanted) and of all weights in a row, by autograd through the twin."""
    d_grads, d_state, *d_weights = _pull(d_updates, d_next, [grads, state, *weights], p, again=False)
    return d_grads, d_state if wants_state else state.new_empty(0), torch.cat([d.reshape(-1) for d in d_weights])


def _pull(
    d_updates: Tensor | None, d_next: Tensor | None, inputs: list[Tensor], p: float, again: bool
) -> tuple[Tensor, ...]:
    """Cotangents of the inputs through the twin; ``again``: differentiable, in the inputs and in the cotangents."""
    with torch.enable_grad():
        # Of their own, or autograd would go on to where they come from.
        leaves = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in inputs]
        outputs = _twin(leaves[0], leaves[1], leaves[2:], p)
    pairs = [(o, d) for o, d in zip(outputs, (d_updates, d_next)) if d is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [d for _, d in pairs], create_graph=again, materialize_grads=True
    )
    return found


def _fake(grads: Tensor, state: Tensor, weights: list[Tensor], p: float) -> tuple[Tensor, Tensor]:
    return grads.new_empty(grads.shape), state.new_empty(state.shape)


def _fake_backward(
    d_updates: Tensor | None,
    d_next: Tensor | None,
    grads: Tensor,
    state: Tensor,
    weights: list[Tensor],
    p: float,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(w.numel() for w in weights)
    d_state = state.new_empty(state.shape if wants_state else 0)
    return grads.new_empty(grads.shape), d_state, grads.new_empty(count)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, list[Tensor], float], output: Any) -> None:
    grads, state, weights, ctx.p = inputs
    ctx.wants_state = state.requires_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grads, state, *weights)


def _backward(ctx: Any, d_updates: Tensor | None, d_next: Tensor | None) -> tuple[Any, ...]:
    grads, state, *weights = ctx.saved_tensors
    if d_updates is None and d_next is None:
        return None, None, [None] * len(weights), None
    if torch.is_grad_enabled():
        # The kernel has no derivative of its own; the twin has them all.
        d_grads, d_state, *rest = _pull(d_updates, d_next, [grads, state, *weights], ctx.p, again=True)
        return d_grads, d_state, rest, None
    d_grads, d_state, d_weights = lstm_vjp(d_updates, d_next, grads, state, weights, ctx.p, ctx.wants_state)
    return d_grads, d_state if ctx.wants_state else None, list(d_weights), None


def lstm_vjp(
    d_updates: Tensor | None,
    d_next: Tensor | None,
    grads: Tensor,
    state: Tensor,
    weights: list[Tensor],
    p: float,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Cotangents of grads, state (if wanted) and each weight for those of updates and next state; unchecked."""
    cotangents = [d for d in (d_updates, d_next) if d is not None]
    native = _runs(grads, state, *weights, *cotangents)
    run = torch.ops.metafast.lstm_update_backward if native else _twin_backward
    d_grads, d_state, flat = run(d_updates, d_next, grads, state, weights, p, wants_state)
    parts = flat.split([w.numel() for w in weights])
    return d_grads, d_state, tuple(part.view(w.shape) for part, w in zip(parts, weights))


def _batched(
    info: Any, in_dims: tuple[Any, ...], grads: Tensor, state: Tensor, weights: list[Tensor], p: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Under vmap: coordinates are independent, so that a batch of them is more coordinates."""
    weight_dims = in_dims[2] or (None,) * len(weights)
    if any(dim is not None for dim in weight_dims):

        def part(t: Tensor, dim: int | None, b: int) -> Tensor:
            return t if dim is None else t.select(dim, b)

        each = [
            torch.ops.metafast.lstm_update(
                part(grads, in_dims[0], b),
                part(state, in_dims[1], b),
                [part(w, dim, b) for w, dim in zip(weights, weight_dims)],
                p,
            )
            for b in range(info.batch_size)
        ]
        return (torch.stack([u for u, _ in each]), torch.stack([s for _, s in each])), (0, 0)
    size = info.batch_size
    # The batch right before the coordinates: (K, B, N) or (B, N).
    grads = grads.expand(size, *grads.shape) if in_dims[0] is None else grads.movedim(in_dims[0], 0)
    grads = grads.movedim(0, -2)
    state = state.unsqueeze(0).expand(size, *state.shape) if in_dims[1] is None else state.movedim(in_dims[1], 0)
    joined = state.movedim(0, 2).flatten(2, 3)
    updates, carried = torch.ops.metafast.lstm_update(grads.flatten(-2), joined, weights, p)
    split = carried.unflatten(2, (size, joined.shape[2] // size))
    return (updates.view(grads.shape), split), (grads.dim() - 2, 2)


_LIBRARY.impl("lstm_update", _twin, "CompositeExplicitAutograd")
_LIBRARY.impl("lstm_update_backward", _twin_backward, "CompositeExplicitAutograd")
torch.library.register_fake("metafast::lstm_update", _fake, lib=_LIBRARY)
torch.library.register_fake("metafast::lstm_update_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("metafast::lstm_update", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_vmap("metafast::lstm_update", _batched, lib=_LIBRARY)
