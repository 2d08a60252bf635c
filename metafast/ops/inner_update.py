"""One step of gradient descent for a batch of tasks: the pattern of every native operator.

From the public function to the loop: :func:`inner_update` here (checks, with the user's names) ->
csrc/torch/inner_update.cpp -> csrc/cpu/inner_update_kernel.h or csrc/cuda/inner_update.cuh. Without kernels for the
tensors at hand: :func:`_twin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from metafast import _check, _native

Rate = float | Tensor

_KERNELS = ("cpu", "simt", "cuda")
_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
_LIBRARY.define("inner_update(Tensor params, Tensor grads, Tensor? lr, float scale) -> Tensor")
_LIBRARY.define("inner_update.list(Tensor[] params, Tensor[] grads, Tensor[] lr, float[] scale) -> Tensor[]")


@overload
def inner_update(params: Tensor, grads: Tensor, lr: Rate) -> Tensor: ...
@overload
def inner_update(params: Sequence[Tensor], grads: Sequence[Tensor], lr: Rate | Sequence[Rate]) -> list[Tensor]: ...
def inner_update(
    params: Tensor | Sequence[Tensor], grads: Tensor | Sequence[Tensor], lr: Rate | Sequence[Rate]
) -> Tensor | list[Tensor]:
    """Parameters of T tasks after one step along their gradients.

        updated[t, p] = params[t, p] - lr[t, p] grads[t, p]

    Differentiable in all three, twice too.

    Args:
        params: (T, P), or (T, ...), or a list of such tensors, one a layer for instance.
        grads: the same shapes.
        lr: a finite number, or a tensor that broadcasts to ``params``: a scalar, (P,), (T, P), (T, 1);
            for lists one for all, or a list with one for each tensor.

    Returns:
        The updated parameters, new and contiguous, shaped like ``params``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named by argument.

    Example:
        >>> inner_update(torch.ones(2, 3), torch.full((2, 3), 2.0), 0.25)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])

    Reference: Finn, Abbeel, Levine, ICML 2017; with a learned (P,) rate it is the step of Meta-SGD, Li et al. 2017.
    """
    if isinstance(params, Tensor):
        rate, scale = _rate("lr", lr)
        _check_one("params", params, "grads", grads, "lr", rate)
        assert isinstance(grads, Tensor)  # checked above
        return _run(params, grads, rate, scale)
    return _inner_update_list(params, grads, lr)


def _run(params: Tensor, grads: Tensor, lr: Tensor | None, scale: float) -> Tensor:
    tensors = (params, grads) if lr is None else (params, grads, lr)
    if _native.runs("params", *tensors, kernels=_KERNELS):
        updated: Tensor = torch.ops.metafast.inner_update(params, grads, lr, scale)
        return updated
    return _twin(params, grads, lr, scale)


def _inner_update_list(params: Any, grads: Any, lr: Any) -> list[Tensor]:
    for name, value in (("params", params), ("grads", grads)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected a tensor or a list of tensors, got {_check.describe(value)}")
    if not params:
        raise ValueError("params: expected at least one tensor, got an empty list")
    if len(grads) != len(params):
        raise ValueError(f"grads: expected {len(params)} tensors as in params, got {len(grads)}")
    if isinstance(lr, (list, tuple)):
        if len(lr) != len(params):
            raise ValueError(f"lr: expected one rate or {len(params)}, as many as params, got {len(lr)}")
        names = [f"lr[{i}]" for i in range(len(lr))]
        rates = [_rate(name, one) for name, one in zip(names, lr)]
    else:
        names, rates = ["lr"] * len(params), [_rate("lr", lr)] * len(params)
    for i, (p, g, name, (rate, _)) in enumerate(zip(params, grads, names, rates)):
        _check_one(f"params[{i}]", p, f"grads[{i}]", g, name, rate)
        if (p.dtype, p.device) != (params[0].dtype, params[0].device):
            raise TypeError(f"params[{i}]: expected dtype and device of params[0], got {_check.describe(p)}")
    tensors = [rate for rate, _ in rates if rate is not None]
    scales = [scale for _, scale in rates]
    if _native.runs("params", *params, *grads, *tensors, kernels=_KERNELS):
        if tensors and len(tensors) < len(rates):
            # The operator takes a tensor for each or for none.
            tensors = [params[0].new_ones(()) if rate is None else rate for rate, _ in rates]
        updated: list[Tensor] = torch.ops.metafast.inner_update.list(list(params), list(grads), tensors, scales)
        return updated
    return [_twin(p, g, rate, scale) for p, g, (rate, scale) in zip(params, grads, rates)]


def _rate(name: str, lr: Any) -> tuple[Tensor | None, float]:
    """A rate as the operator takes it: a tensor or none, and a factor."""
    if isinstance(lr, Tensor):
        return lr, 1.0
    return None, _check.number(name, lr)


def _check_one(p_name: str, params: Any, g_name: str, grads: Any, lr_name: str, lr: Tensor | None) -> None:
    _check.tensor(p_name, params)
    if params.dim() < 1 or not params.is_floating_point():
        raise TypeError(f"{p_name}: expected a floating tensor (T, ...), got {_check.describe(params)}")
    _check.tensor(g_name, grads)
    if grads.shape != params.shape:
        raise ValueError(f"{g_name}: expected shape {tuple(params.shape)} as {p_name}, got {_check.describe(grads)}")
    _like(g_name, grads, params, p_name)
    if lr is None:
        return
    _like(lr_name, lr, params, p_name)
    shape = tuple(lr.shape)
    fits = len(shape) <= params.dim() and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(shape), reversed(params.shape))
    )
    if not fits:
        raise ValueError(
            f"{lr_name}: expected a shape that broadcasts to {tuple(params.shape)}, got {_check.describe(lr)}"
        )


def _like(name: str, value: Tensor, params: Tensor, owner: str) -> None:
    _check.like(name, value, dtype=params.dtype, device=params.device, owner=owner)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected dtype {params.dtype}, that of {owner}, got {_check.describe(value)}")


def _twin(params: Tensor, grads: Tensor, lr: Tensor | None, scale: float) -> Tensor:
    """The operator in PyTorch's own operations."""
    return (params - (scale * grads if lr is None else scale * lr * grads)).contiguous()


def _twin_list(params: list[Tensor], grads: list[Tensor], lr: list[Tensor], scale: list[float]) -> list[Tensor]:
    rates: list[Tensor | None] = [*lr] or [None] * len(params)
    return [_twin(p, g, r, s) for p, g, r, s in zip(params, grads, rates, scale)]


def _fake(params: Tensor, grads: Tensor, lr: Tensor | None, scale: float) -> Tensor:
    return params.new_empty(params.shape)


def _fake_list(params: list[Tensor], grads: list[Tensor], lr: list[Tensor], scale: list[float]) -> list[Tensor]:
    return [p.new_empty(p.shape) for p in params]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: Tensor) -> None:
    _, grads, lr, ctx.scale = inputs
    ctx.save_for_backward(grads, lr)


def _backward(ctx: Any, d_updated: Tensor) -> tuple[Tensor | None, ...]:
    """Ordinary operations, so that it can be differentiated again."""
    grads, lr = ctx.saved_tensors
    wants_params, wants_grads, wants_lr, _ = ctx.needs_input_grad
    d_params = d_updated if wants_params else None
    return d_params, *_d_grads_and_lr(d_updated, grads, lr, ctx.scale, wants_grads, wants_lr), None


def _d_grads_and_lr(
    d_updated: Tensor, grads: Tensor, lr: Tensor | None, scale: float, wants_grads: bool, wants_lr: bool
) -> tuple[Tensor | None, Tensor | None]:
    d_grads = d_lr = None
    if wants_grads:
        d_grads = -scale * (d_updated if lr is None else lr * d_updated)
    if wants_lr and lr is not None:
        d_lr = (-scale * grads * d_updated).sum_to_size(lr.shape)
    return d_grads, d_lr


def _keep_list(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], list[Tensor], list[float]], output: Any) -> None:
    _, grads, lr, ctx.scale = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grads, *lr)


def _backward_list(ctx: Any, d_updated: list[Tensor]) -> tuple[Any, ...]:
    grads, lr = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    rates = lr or (None,) * ctx.count
    wants_params, wants_grads, wants_lr, _ = ctx.needs_input_grad
    d_params = [d if wanted else None for d, wanted in zip(d_updated, wants_params)]
    rest = [
        _d_grads_and_lr(*one)
        for one in zip(d_updated, grads, rates, ctx.scale, wants_grads, wants_lr or (False,) * ctx.count)
    ]
    return d_params, [d_grads for d_grads, _ in rest], [d_lr for _, d_lr in rest] if lr else [], None


Dims = tuple[int | None, ...]


def _batched(
    info: Any, in_dims: Dims, params: Tensor, grads: Tensor, lr: Tensor | None, scale: float
) -> tuple[Tensor, int]:
    """Under vmap: the batch goes to the front, and the operator sees one more dimension."""
    rank = max(t.dim() - (dim is not None) for t, dim in zip((params, grads, lr), in_dims) if t is not None)

    def front(t: Tensor, dim: int | None) -> Tensor:
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        return t.reshape(t.shape[0], *(1,) * (rank + 1 - t.dim()), *t.shape[1:])

    params, grads = (front(t, dim).expand(info.batch_size, *(-1,) * rank) for t, dim in zip((params, grads), in_dims))
    return _run(params, grads, None if lr is None else front(lr, in_dims[2]), scale), 0


def _batched_list(
    info: Any,
    in_dims: tuple[Dims, Dims, Dims, Any],
    params: list[Tensor],
    grads: list[Tensor],
    lr: list[Tensor],
    scale: list[float],
) -> tuple[list[Tensor], list[int]]:
    rates: list[Tensor | None] = [*lr] or [None] * len(params)
    all_dims = zip(in_dims[0], in_dims[1], in_dims[2] or (None,) * len(params))
    updated = [_batched(info, *one)[0] for one in zip(all_dims, params, grads, rates, scale)]
    return updated, [0] * len(updated)


# On devices without kernels the operator itself is the twin; a kernel of the extension takes precedence.
_LIBRARY.impl("inner_update", _twin, "CompositeExplicitAutograd")
_LIBRARY.impl("inner_update.list", _twin_list, "CompositeExplicitAutograd")
torch.library.register_fake("metafast::inner_update", _fake, lib=_LIBRARY)
torch.library.register_fake("metafast::inner_update.list", _fake_list, lib=_LIBRARY)
torch.library.register_autograd("metafast::inner_update", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("metafast::inner_update.list", _backward_list, setup_context=_keep_list, lib=_LIBRARY)
torch.library.register_vmap("metafast::inner_update", _batched, lib=_LIBRARY)
torch.library.register_vmap("metafast::inner_update.list", _batched_list, lib=_LIBRARY)
