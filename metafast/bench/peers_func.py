"""Meta-gradients by ``torch.func``: the usual recipe, the exact one, the latter compiled; and TorchOpt's by ``vmap``.

The usual recipe, ``grad(vmap(task).mean())``, is that of PyTorch's own and of TorchOpt's few-shot examples. With
normalisation layers among what adapts it is silently wrong (docs/design.md); it takes part for its number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from metafast.bench.sides import Prepared, by_backward
from metafast.bench.workloads import Problem
from metafast.losses import NAMED, LossFunction

Parameters = tuple[Tensor, ...]
# (values, support_x, support_y, query_x, query_y) -> the query loss of a task
Task = Callable[[Parameters, Tensor, Tensor, Tensor, Tensor], Tensor]
_IN_DIMS = (None, 0, 0, 0, 0)


def plain(problem: Problem) -> tuple[nn.Module, LossFunction]:
    """The model without running statistics, and the loss."""
    replace_all_batch_norm_modules_(problem.model)
    return problem.model, NAMED[problem.workload.loss]


def _loss(problem: Problem) -> Callable[[Parameters, Tensor, Tensor], Tensor]:
    """Of parameters' values, in their order, and a set of samples."""
    model, criterion = plain(problem)
    names = [name for name, _ in model.named_parameters()]

    def loss(values: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(model, dict(zip(names, values)), (x,)), y)

    return loss


def _task(problem: Problem) -> Task:
    w, loss = problem.workload, _loss(problem)

    def task(values: Parameters, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(w.steps):
            grads = grad(loss)(values, xs, ys)
            values = tuple(v - w.lr * g for v, g in zip(values, grads))
        return loss(values, xq, yq)

    return task


def _prepared(problem: Problem, meta_gradient: Callable[..., Parameters]) -> Prepared:
    """A side whose step is ``meta_gradient(values, *sets)``, with no graph around it."""
    values = tuple(p.detach() for p in problem.model.parameters())
    e, last = problem.episodes, list[Tensor]()

    def step() -> None:
        with torch.no_grad():
            last[:] = meta_gradient(values, e.support_x, e.support_y, e.query_x, e.query_y)

    return Prepared(step, lambda: torch.cat([g.reshape(-1) for g in last]))


def _exact(problem: Problem) -> Callable[..., Parameters]:
    task = _task(problem)

    def meta_gradient(values: Parameters, *sets: Tensor) -> Parameters:
        return tuple(g.mean(0) for g in vmap(grad(task), in_dims=_IN_DIMS)(values, *sets))

    return meta_gradient


def vmap_of_grad(problem: Problem) -> Prepared:
    """``vmap(grad(task))``, averaged afterwards: exact."""
    return _prepared(problem, _exact(problem))


def grad_of_vmap(problem: Problem) -> Prepared:
    """``grad(vmap(task).mean())``, the usual recipe."""
    task = _task(problem)

    def mean_loss(values: Parameters, *sets: Tensor) -> Tensor:
        return vmap(task, in_dims=_IN_DIMS)(values, *sets).mean()

    return _prepared(problem, grad(mean_loss))


def compiled(problem: Problem, compiler: str = "inductor") -> Prepared:
    """``torch.compile`` of ``vmap(grad(task))``, the whole meta-step in one graph.

    Args:
        problem: a MAML one.
        compiler: torch.compile's backend.
    """
    # Without what was compiled for other problems: sizes seen to change would be compiled as variables, for the worse.
    torch.compiler.reset()
    return _prepared(problem, torch.compile(_exact(problem), backend=compiler, fullgraph=True, dynamic=False))


def torchopt_vmap(problem: Problem) -> Prepared:
    """TorchOpt's functional optimiser within a task, ``vmap`` over tasks, ``backward`` of the mean."""
    torchopt = importlib.import_module("torchopt")
    w, loss = problem.workload, _loss(problem)
    values = tuple(problem.model.parameters())
    inner = torchopt.sgd(lr=w.lr)

    def task(values: Parameters, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        state = inner.init(values)
        for _ in range(w.steps):
            updates, state = inner.update(grad(loss)(values, xs, ys), state, inplace=False)
            values = torchopt.apply_updates(values, updates, inplace=False)
        return loss(values, xq, yq)

    e = problem.episodes
    return by_backward(
        problem,
        lambda: vmap(task, in_dims=_IN_DIMS)(values, e.support_x, e.support_y, e.query_x, e.query_y).mean(),
    )
