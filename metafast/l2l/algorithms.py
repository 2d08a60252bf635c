"""MAML and Meta-SGD by hand: clone a module, adapt the clone to a task's loss, send the query loss backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.l2l.utils import clone_module, clone_parameters, same_number, update_module

Module = TypeVar("Module", bound=nn.Module)


def maml_update(model: Module, lr: float | Tensor, grads: Iterable[Tensor | None] | None = None) -> Module:
    """p - lr g in the place of every parameter p of a module, which is given back.

    Args:
        model: usually a clone.
        lr: a number, or a tensor of none or of the parameters' dimensions.
        grads: g for each of ``model.parameters()``, None for one that stays. None: p + ``p.update`` instead, where p
            has such an attribute.

    Raises:
        ValueError: another number of gradients than of parameters.
    """
    if grads is None:
        return update_module(model)
    grads = same_number("grads", list(grads), list(model.parameters()))
    return update_module(model, [None if g is None else -lr * g for g in grads])


def meta_sgd_update(
    model: Module, lrs: Iterable[Tensor] | None = None, grads: Iterable[Tensor | None] | None = None
) -> Module:
    """p - alpha * g in the place of every parameter p of a module, which is given back.

    Args:
        model: usually a clone.
        lrs: alpha for each of ``model.parameters()``, of its shape. None: its attribute ``_lr``.
        grads: g for each, None for one that stays. None: its ``grad``, which is None afterwards.

    Raises:
        ValueError: another number of rates or of gradients than of parameters; a rate that is not there.
    """
    parameters = list(model.parameters())
    rates: list[Tensor | None] = [getattr(p, "_lr", None) for p in parameters] if lrs is None else list(lrs)
    found = [p.grad for p in parameters] if grads is None else list(grads)
    same_number("lrs", rates, parameters)
    same_number("grads", found, parameters)
    updates: list[Tensor | None] = []
    for (name, p), rate, g in zip(model.named_parameters(), rates, found):
        if g is not None and rate is None:
            raise ValueError(f"lrs: expected a rate for parameter {name!r}, got None")
        updates.append(None if g is None or rate is None else -rate * g)
        if grads is None:
            p.grad = None
    return update_module(model, updates)


class BaseLearner(nn.Module):
    """A module around another, ``self.module``, whose attributes are its own too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = _check.module("model", module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not self.module: while a learner is unpickled there is none, and to ask for it would end here again.
            module = vars(self).get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        return self.module(*args, **kwargs)


class MAML(BaseLearner):
    """learn2learn's MAML: a module with ``clone()`` and ``adapt()``.

        phi_0 = clone of theta;  phi_{k+1} = phi_k - lr grad loss(phi_k)

    Args:
        model: any module.
        lr: of a step; a number or a tensor, a parameter for one that is learned.
        first_order: whether steps take their gradients for constants.
        allow_unused: whether a parameter may be left out of a loss, and stays; None: as ``allow_nograd``.
        allow_nograd: whether a parameter may require no gradient, and stays.

    Example:
        >>> maml = MAML(nn.Linear(2, 1), lr=0.1)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> learner = maml.clone()
        >>> learner.adapt(nn.functional.mse_loss(learner(x), y))
        >>> nn.functional.mse_loss(learner(x), y).backward()
        >>> maml.weight.grad.shape  # of the module inside
        torch.Size([1, 2])

    Reference: Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr = lr if isinstance(lr, Tensor) else _check.number("lr", lr)
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One step along the gradient of ``loss``, a scalar made from this learner's outputs; the options for it alone.

        Raises:
            TypeError, ValueError: no scalar tensor; a parameter that the options do not allow, named.
        """
        first_order = self.first_order if first_order is None else first_order
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        grads = _gradients(self.module, loss, first_order, allow_unused, allow_nograd)
        self.module = maml_update(self.module, self.lr, grads)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner of a clone of the module, see :func:`~metafast.l2l.clone_module`; options of its own if given."""
        return MAML(
            clone_module(self.module),
            self.lr,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )


class MetaSGD(BaseLearner):
    """learn2learn's Meta-SGD: as :class:`MAML`, with a learned rate for every number of every parameter.

        phi_0 = clone of theta;  phi_{k+1} = phi_k - alpha * grad loss(phi_k)

    Args:
        model: any module; all its parameters must require gradients.
        lr: where the rates start.
        first_order: whether steps take their gradients for constants.
        lrs: the rates, of each of ``model.parameters()`` and of its shape; instead of ``lr``.

    Attributes:
        lrs: the rates, learned with the module.

    Example:
        >>> meta = MetaSGD(nn.Linear(2, 1), lr=0.1)
        >>> learner = meta.clone()
        >>> learner.adapt(learner(torch.ones(4, 2)).square().mean())
        >>> learner(torch.ones(4, 2)).square().mean().backward()
        >>> [rate.grad.shape for rate in meta.lrs]
        [torch.Size([1, 2]), torch.Size([1])]

    Reference: Li, Zhou, Chen & Li 2017, arXiv:1707.09835.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Iterable[Tensor] | None = None
    ) -> None:
        super().__init__(model)
        if lrs is None:
            start = _check.number("lr", lr)
            lrs = nn.ParameterList(nn.Parameter(torch.full_like(p, start)) for p in model.parameters())
        self.lrs = lrs if isinstance(lrs, nn.ParameterList) else list(lrs)
        self.first_order = first_order

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One step along the gradient of ``loss``, a scalar made from this learner's outputs.

        Raises:
            TypeError, ValueError: no scalar tensor; a parameter that it does not use or that requires no gradient.
        """
        grads = _gradients(self.module, loss, self.first_order if first_order is None else first_order, False, False)
        self.module = meta_sgd_update(self.module, self.lrs, grads)

    def clone(self) -> MetaSGD:
        """A learner of a clone of the module and of the rates."""
        return MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=clone_parameters(self.lrs))


def _gradients(
    module: nn.Module, loss: Tensor, first_order: bool, allow_unused: bool, allow_nograd: bool
) -> list[Tensor | None]:
    """The loss's gradient for each parameter, None for one that stays."""
    if _check.tensor("loss", loss).numel() != 1:
        raise ValueError(f"loss: expected a scalar, got {_check.describe(loss)}")
    named = dict(module.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if frozen and not allow_nograd:
        raise ValueError(
            f"model: expected parameters that require gradients, {', '.join(frozen)} do not; allow_nograd=True of MAML "
            "leaves such as they are"
        )
    moving = {name: p for name, p in named.items() if p.requires_grad}
    graph = not first_order
    found = torch.autograd.grad(loss, list(moving.values()), retain_graph=graph, create_graph=graph, allow_unused=True)
    grads: dict[str, Tensor | None] = dict(zip(moving, found))
    unused = [name for name, g in grads.items() if g is None]
    if unused and not allow_unused:
        raise ValueError(
            f"loss: expected one of all parameters, it does not use {', '.join(unused)}; allow_unused=True of MAML "
            "leaves such as they are"
        )
    return [grads.get(name) for name in named]
