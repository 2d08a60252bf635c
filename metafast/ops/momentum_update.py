"""One step of gradient descent with momentum for a batch of tasks.

From the public function to the loop: :func:`momentum_update` here (checks, with the user's names) ->
csrc/torch/momentum_update.cpp -> csrc/cpu/momentum_update_kernel.h or csrc/cuda/momentum_update.cuh. Without kernels
for the tensors at hand: :func:`_twin`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _check, _native

_KERNELS = ("cpu", "simt", "cuda")
_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
_LIBRARY.define(
    "momentum_update(Tensor params, Tensor grads, Tensor? velocity, float lr, float momentum) -> (Tensor, Tensor)"
)


def momentum_update(
    params: Tensor, grads: Tensor, velocity: Tensor | None, lr: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Parameters of T tasks, and their velocities, after one step of the heavy ball.

        velocity'[t, p] = momentum velocity[t, p] + grads[t, p]
        updated[t, p] = params[t, p] - lr velocity'[t, p]

    Differentiable in the three tensors, twice too.

    Args:
        params: (T, P), or (T, ...).
        grads: the same shape.
        velocity: the same shape; None: 0, before the first step.
        lr: a finite number.
        momentum: a finite number.

    Returns:
        The updated parameters and velocity', new and contiguous, shaped like ``params``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named by argument.

    Example:
        >>> phi, v = momentum_update(torch.ones(1, 2), torch.tensor([[2.0, 4.0]]), None, 0.25, 0.5)
        >>> phi, v = momentum_update(phi, torch.zeros(1, 2), v, 0.25, 0.5)
        >>> phi, v
        (tensor([[ 0.2500, -0.5000]]), tensor([[1., 2.]]))

    Reference: Polyak, USSR Computational Mathematics and Mathematical Physics 4(5), 1964.
    """
    _check.tensor("params", params)
    if params.dim() < 1 or not params.is_floating_point():
        raise TypeError(f"params: expected a floating tensor (T, ...), got {_check.describe(params)}")
    _check_like("grads", grads, params)
    if velocity is not None:
        _check_like("velocity", velocity, params)
    return _run(params, grads, velocity, _check.number("lr", lr), _check.number("momentum", momentum))


def _check_like(name: str, value: Any, params: Tensor) -> None:
    _check.tensor(name, value)
    if value.shape != params.shape:
        raise ValueError(f"{name}: expected shape {tuple(params.shape)} as params, got {_check.describe(value)}")
    _check.like(name, value, dtype=params.dtype, device=params.device, owner="params")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected dtype {params.dtype}, that of params, got {_check.describe(value)}")


def _run(params: Tensor, grads: Tensor, velocity: Tensor | None, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    tensors = (params, grads) if velocity is None else (params, grads, velocity)
    if _native.runs("params", *tensors, kernels=_KERNELS):
        updated, after = torch.ops.metafast.momentum_update(params, grads, velocity, lr, momentum)
        return updated, after
    return _twin(params, grads, velocity, lr, momentum)


def _twin(params: Tensor, grads: Tensor, velocity: Tensor | None, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """The operator in PyTorch's own operations."""
    # Not grads itself: an operator's output is no input of it.
    after = grads.clone(memory_format=torch.contiguous_format) if velocity is None else momentum * velocity + grads
    return (params - lr * after).contiguous(), after.contiguous()


def _fake(params: Tensor, grads: Tensor, velocity: Tensor | None, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    return params.new_empty(params.shape), params.new_empty(params.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float, float], output: Any) -> None:
    ctx.lr, ctx.momentum = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_updated: Tensor | None, d_after: Tensor | None) -> tuple[Tensor | None, ...]:
    """Ordinary operations, so that it can be differentiated again."""
    wants_params, wants_grads, wants_velocity, *_ = ctx.needs_input_grad
    along = d_after
    if d_updated is not None and (wants_grads or wants_velocity):
        step = ctx.lr * d_updated
        along = -step if d_after is None else d_after - step
    d_velocity = ctx.momentum * along if wants_velocity and along is not None else None
    return d_updated if wants_params else None, along if wants_grads else None, d_velocity, None, None


def _batched(
    info: Any,
    in_dims: tuple[int | None, ...],
    params: Tensor,
    grads: Tensor,
    velocity: Tensor | None,
    lr: float,
    momentum: float,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Under vmap: elements are independent, so that the batch is one more dimension, at the front."""

    def front(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    v = None if velocity is None else front(velocity, in_dims[2])
    return _run(front(params, in_dims[0]), front(grads, in_dims[1]), v, lr, momentum), (0, 0)


# On devices without kernels the operator itself is the twin; a kernel of the extension takes precedence.
_LIBRARY.impl("momentum_update", _twin, "CompositeExplicitAutograd")
torch.library.register_fake("metafast::momentum_update", _fake, lib=_LIBRARY)
torch.library.register_autograd("metafast::momentum_update", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_vmap("metafast::momentum_update", _batched, lib=_LIBRARY)
