"""Hessian-vector products.

Of a function, by PyTorch's own derivatives. Of a network's loss by the engine's kernels, as a registered operator; from
the public function to the loop: :func:`hvp` here -> csrc/torch/hvp.cpp -> csrc/torch/engine.cpp -> csrc/cpu/unroll.h.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from metafast import _check, _native
from metafast.engine.layout import Layout
from metafast.engine.task_model import TaskModel
from metafast.episodes import check_set
from metafast.losses import resolve_loss

Params = Tensor | Mapping[str, Tensor]

_LIBRARY = torch.library.Library("metafast", "FRAGMENT")
_LIBRARY.define(
    "hvp(Tensor params, Tensor vector, Tensor constants, Tensor x, Tensor y, int[] program, float[] numbers) -> Tensor"
)


def hvp(
    fn_or_module: Callable[..., Tensor] | nn.Module,
    params: Params,
    vector: Params,
    *batch: object,
    loss: str | None = None,
) -> Params:
    """H v, the Hessian of a scalar function at ``params`` times ``vector``, without forming H.

        (H v)_i = sum_j d^2 L / dparams_i dparams_j  v_j,   L = fn(params, *batch)

    Reverse over reverse (Pearlmutter 1994's product by another route), exact for any twice differentiable function.
    With ``loss`` L is that of a network's outputs, ``L = loss(module(x), y)``, and networks that the engine lowers go
    by its kernels: forward, backward and the tangents of both. There the result is differentiable in ``vector`` only,
    so where ``params`` require gradients, inside torch.func's transforms and inside torch.compile, PyTorch's
    derivatives do it.

    Args:
        fn_or_module: ``fn(params, *batch)`` -> scalar, or a module whose forward returns a scalar for ``*batch``;
            a module gets ``params`` in place of its own by ``functional_call``.
        params: a tensor or a dict of tensors by name.
        vector: like ``params`` in names, shapes and dtypes.
        batch: what the function takes besides; with ``loss``: x (N, ...) and y (N,) labels or (N, ...) targets.
        loss: ``"cross_entropy"`` or ``"mse"``, for a module whose forward takes x and gives outputs (N, ...); params
            are then all its trainable parameters by name. Batch norm takes the batch's statistics, as in learners.

    Returns:
        H v, like ``params``.

    Raises:
        TypeError, ValueError: params and vector that do not fit each other, a result that is no scalar; with ``loss``
            a batch that does not fit the module.

    Example:
        >>> import torch
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
        >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> params = {name: p.detach() for name, p in net.named_parameters()}
        >>> {name: tuple(p.shape) for name, p in hvp(net, params, params, x, y, loss="cross_entropy").items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    _check_pair(params, vector)
    if loss is not None:
        return _of_loss(fn_or_module, params, vector, batch, loss)
    if isinstance(fn_or_module, nn.Module):
        module = fn_or_module
        if not isinstance(params, Mapping):
            raise TypeError(f"params: a module's parameters are a dict by name, got {_check.describe(params)}")

        def function(p: Params, *rest: object) -> Tensor:
            result: Tensor = functional_call(module, dict(p), rest)
            return result
    elif callable(fn_or_module):
        function = fn_or_module
    else:
        raise TypeError(f"fn_or_module: expected a module or a callable, got {_check.describe(fn_or_module)}")

    def scalar(p: Params) -> Tensor:
        value = function(p, *batch)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"fn_or_module: expected a scalar tensor, got {_check.describe(value)}")
        return value

    point = params if isinstance(params, Tensor) else dict(params)
    pull = vjp(grad(scalar), point)[1]
    product: Params = pull(vector if isinstance(vector, Tensor) else dict(vector))[0]
    return product


def _of_loss(module: object, params: Params, vector: Params, batch: tuple[object, ...], loss: str) -> Params:
    if not isinstance(module, nn.Module):
        raise TypeError(f"fn_or_module: with loss={loss!r} expected a module, got {_check.describe(module)}")
    if not isinstance(params, Mapping) or not isinstance(vector, Mapping):
        raise TypeError(f"params: a module's parameters are a dict by name, got {_check.describe(params)}")
    if len(batch) != 2:
        raise TypeError(f"batch: with loss={loss!r} expected x and y, got {len(batch)} arguments")
    for name, value in zip("xy", batch):
        _check.tensor(name, value)
    x, y = batch
    assert isinstance(x, Tensor) and isinstance(y, Tensor)  # for the type checker
    if torch.compiler.is_compiling():
        return _traced(module, params, vector, x, y, loss)
    task = _task(module, loss)
    names = task.layout.names
    if set(params) != set(names):
        raise ValueError(f"params: expected the module's trainable {sorted(names)}, got {sorted(params)}")
    one_x, one_y = x.unsqueeze(0), y.unsqueeze(0)
    check_set("x", one_x, "y", one_y)
    task.loss.check("x", "y", one_y, task.check_inputs("x", one_x))
    for name, shape in zip(names, task.layout.shapes):
        if params[name].shape != shape:
            raise ValueError(f"params[{name!r}]: expected shape {tuple(shape)}, got {_check.describe(params[name])}")
        _check.like(f"params[{name!r}]", params[name], dtype=x.dtype, device=x.device, owner="x")
    found = _by_kernels(task, [params[name] for name in names], [vector[name] for name in names], one_x, one_y)
    if found is not None:
        return found

    def objective(values: Mapping[str, Tensor]) -> Tensor:
        return task.task_loss(tuple(values[name] for name in names), task.constants(), x, y)

    with task.policy():
        product: Params = vjp(grad(objective), dict(params))[1](dict(vector))[0]
    return product


def _traced(module: nn.Module, params: Params, vector: Params, x: Tensor, y: Tensor, loss: str) -> Params:
    """For torch.compile, which follows PyTorch's derivatives but not the making of a lowered network."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ValueError("fn_or_module: hvp of a network with batch norm does not compile; call it outside")
    function = resolve_loss(loss).function

    def objective(values: Params) -> Tensor:
        return function(functional_call(module, dict(values), (x,)), y)

    product: Params = vjp(grad(objective), dict(params))[1](dict(vector))[0]
    return product


def _by_kernels(
    task: TaskModel, params: list[Tensor], vector: list[Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor] | None:
    """By the registered operator, None where that cannot."""
    obstacle = (
        "params require gradients, and hvp's kernels have none in them"
        if any(p.requires_grad for p in params)
        else None
    )
    if not _native.runs("params", *params, *vector, x, kernels=("cpu", "simt", "cuda"), obstacle=obstacle):
        return None
    network = task.native(x)
    if network is None:
        task.native.warn(x)
        return None
    constants = network.constants()
    ints, numbers = network.descriptor
    fixed = x.new_empty(0) if constants is None else constants
    row = torch.ops.metafast.hvp(_row(params), _row(vector), fixed, x, y, ints, numbers)
    return task.layout.unflatten(row[0])


def _row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).unsqueeze(0)


# The latest modules' task models, which hold what was lowered. Not weakly by module: they refer to it.
_MOST_KEPT = 8
_tasks: OrderedDict[tuple[int, str], TaskModel] = OrderedDict()


def _task(module: nn.Module, loss: str) -> TaskModel:
    key = (id(module), loss)
    task = _tasks.get(key)
    if task is None or task.layout != Layout.of(module, "fn_or_module"):
        task = _tasks[key] = TaskModel(module, resolve_loss(loss), "batch", argument="fn_or_module")
    _tasks.move_to_end(key)
    if len(_tasks) > _MOST_KEPT:
        _tasks.popitem(last=False)
    return task


def _fake(
    params: Tensor, vector: Tensor, constants: Tensor, x: Tensor, y: Tensor, program: list[int], numbers: list[float]
) -> Tensor:
    return params.new_empty(params.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int], list[float]], output: Any) -> None:
    params, _, constants, x, y, ctx.program, ctx.numbers = inputs
    ctx.save_for_backward(params, constants, x, y)


def _backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, ...]:
    """H is symmetric; third derivatives are not written."""
    wanted = ctx.needs_input_grad
    if any(wanted[i] for i in (0, 2, 3)):
        raise NotImplementedError("metafast: hvp of a lowered network is differentiable in its vector only")
    params, constants, x, y = ctx.saved_tensors
    product = torch.ops.metafast.hvp(params, d_product, constants, x, y, ctx.program, ctx.numbers)
    return None, product, None, None, None, None, None


torch.library.register_fake("metafast::hvp", _fake, lib=_LIBRARY)
torch.library.register_autograd("metafast::hvp", _backward, setup_context=_keep, lib=_LIBRARY)


def _check_pair(params: Params, vector: Params) -> None:
    if isinstance(params, Tensor):
        _check.tensor("vector", vector)
        pairs = {"vector": (params, vector)}
    elif isinstance(params, Mapping):
        if not isinstance(vector, Mapping):
            raise TypeError(f"vector: expected a dict of tensors like params, got {_check.describe(vector)}")
        if set(params) != set(vector):
            raise ValueError(f"vector: expected the names {sorted(params)} of params, got {sorted(vector)}")
        pairs = {f"vector[{name!r}]": (params[name], vector[name]) for name in params}
    else:
        raise TypeError(f"params: expected a tensor or a dict of tensors, got {_check.describe(params)}")
    for name, (p, v) in pairs.items():
        _check.tensor(name.replace("vector", "params"), p)
        _check.tensor(name, v)
        assert isinstance(p, Tensor) and isinstance(v, Tensor)  # the checks above, for the type checker
        if p.shape != v.shape:
            raise ValueError(f"{name}: expected shape {tuple(p.shape)} as in params, got {_check.describe(v)}")
        _check.like(name, v, dtype=p.dtype, device=p.device, owner="params")
