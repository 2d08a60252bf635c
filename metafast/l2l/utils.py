"""Modules whose parameters are results of autograd: cloned, updated and detached.

Such a module holds plain tensors where a module of torch holds :class:`torch.nn.Parameter`; ``parameters()`` and
forward take them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metafast import _check

Module = TypeVar("Module", bound=nn.Module)


def clone_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """A copy of a module whose parameters are ``torch.clone`` of the module's: gradients flow back to these.

    Buffers that require gradients are cloned too; all others are the module's own, so that the running statistics of
    its batch norms count what goes through its clones. What is shared in the module, a parameter or a submodule, is
    shared in the copy. Plain attributes are not copied.

    Args:
        module: any module, a clone too.
        memo: copies by ``id`` of what they are copies of; filled, and used for what is in it.

    Raises:
        TypeError: no module.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> clone_module(net)(torch.ones(3, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[3., 3.]])
    """
    return _clone(_check.module("module", module), {} if memo is None else memo)  # type: ignore[return-value]


def _clone(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    clone = type(module).__new__(type(module))
    memo[id(module)] = clone
    vars(clone).update(vars(module))

    def copied(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone()
        return memo[id(tensor)]

    clone._parameters = {name: copied(p) for name, p in module._parameters.items()}
    clone._buffers = {
        name: copied(b) if b is not None and b.requires_grad else b for name, b in module._buffers.items()
    }
    clone._modules = {name: None if m is None else _clone(m, memo) for name, m in module._modules.items()}
    return clone


def update_module(
    module: Module, updates: Iterable[Tensor | None] | None = None, memo: dict[int, Tensor] | None = None
) -> Module:
    """Put p + u in the place of every parameter p of a module, by the module's own graph; gives the module back.

    Args:
        module: the module, usually a clone: parameters of an optimiser would be replaced as well.
        updates: u for each of ``module.parameters()``, None for one that stays. None: each one's attribute ``update``,
            if it has one, buffers' too; it is None afterwards.
        memo: new tensors by ``id`` of the old; filled, and used for what is in it.

    Raises:
        TypeError: no module.
        ValueError: another number of updates than of parameters.

    Example:
        >>> net = clone_module(nn.Linear(2, 1, bias=False))
        >>> before = net.weight
        >>> torch.equal(update_module(net, [torch.ones(1, 2)]).weight, before + 1)
        True
    """
    _check.module("module", module)
    tensors: list[Tensor] = list(module.parameters())
    if updates is None:
        tensors += module.buffers()
        updates = [getattr(tensor, "update", None) for tensor in tensors]
        for tensor, update in zip(tensors, updates):
            if update is not None:
                tensor.update = None  # type: ignore[attr-defined]
    updates = same_number("updates", list(updates), tensors)
    stepped = {} if memo is None else memo
    for tensor, update in zip(tensors, updates):
        if update is not None and id(tensor) not in stepped:
            stepped[id(tensor)] = tensor + update
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            table.update({name: stepped[id(tensor)] for name, tensor in table.items() if id(tensor) in stepped})
    return module


def same_number(name: str, values: list[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The values, if they are as many as the parameters."""
    if len(values) != len(parameters):
        raise ValueError(f"{name}: expected {len(parameters)}, one a parameter of the module, got {len(values)}")
    return values


def detach_module(module: nn.Module, keep_requires_grad: bool = False) -> None:
    """Cut the parameters of a module from their graph, in place, and the buffers that require gradients.

    Args:
        module: usually a clone.
        keep_requires_grad: whether what required gradients does so afterwards, as a leaf; else nothing does.

    Raises:
        TypeError: no module.

    Example:
        >>> clone = clone_module(nn.Linear(2, 1))
        >>> detach_module(clone, keep_requires_grad=True)
        >>> clone.weight.is_leaf, clone.weight.requires_grad
        (True, True)
    """
    _check.module("module", module)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.requires_grad:
            tensor.detach_().requires_grad_(keep_requires_grad)


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """``torch.clone`` of each."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``torch.clone`` of each, by name."""
    return {name: p.clone() for name, p in param_dict.items()}


def magic_box(x: Any) -> Any:
    """exp(x - cut(x)): 1, with the derivative of x (DiCE, Foerster et al. 2018); what is no tensor as it is."""
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """Scalar, the share of scores preds (N, C) that are largest at the label, of targets (N,)."""
    return (preds.argmax(dim=1) == targets).float().mean()
