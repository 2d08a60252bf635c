"""Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from metafast import _check

Params = Tensor | Mapping[str, Tensor]


def hvp(fn_or_module: Callable[..., Tensor] | nn.Module, params: Params, vector: Params, *batch: object) -> Params:
    """H v, the Hessian of a scalar function at ``params`` times ``vector``, without forming H.

        (H v)_i = sum_j d^2 L / dparams_i dparams_j  v_j,   L = fn(params, *batch)

    Reverse over reverse (Pearlmutter 1994's product by another route), exact for any twice differentiable function.

    Args:
        fn_or_module: ``fn(params, *batch)`` -> scalar, or a module whose forward returns a scalar for ``*batch``;
            a module gets ``params`` in place of its own by ``functional_call``.
        params: a tensor or a dict of tensors by name.
        vector: like ``params`` in names, shapes and dtypes.
        batch: what the function takes besides.

    Returns:
        H v, like ``params``.

    Raises:
        TypeError, ValueError: params and vector that do not fit each other, a result that is no scalar.

    Example:
        >>> import torch
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    _check_pair(params, vector)
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
