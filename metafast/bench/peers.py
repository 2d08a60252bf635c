"""Other libraries' meta-gradients, each in the idiom of its own documentation.

They run on the same modules, with running statistics taken out of the batch norms: none of them needs any, they cost
time, and ``vmap`` cannot write them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from metafast.bench.peers_jax import jax_prepared
from metafast.bench.sides import Prepared, Side, by_backward
from metafast.bench.workloads import Problem
from metafast.losses import NAMED, LossFunction


def _plain(problem: Problem) -> tuple[nn.Module, LossFunction]:
    """The model without running statistics, and the loss."""
    replace_all_batch_norm_modules_(problem.model)
    return problem.model, NAMED[problem.workload.loss]


def _over_tasks(problem: Problem, task: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """A side that goes through the tasks one by one: ``task`` gives the query loss of one."""
    e = problem.episodes

    def loss() -> Tensor:
        losses = [task(*sets) for sets in zip(e.support_x, e.support_y, e.query_x, e.query_y)]
        return torch.stack(losses).mean()

    return by_backward(problem, loss)


def _learn2learn(problem: Problem) -> Prepared:
    l2l = importlib.import_module("learn2learn")
    w, (model, criterion) = problem.workload, _plain(problem)
    if w.learner == "protonets":

        def prototypes(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
            embedded = model(torch.cat([xs, xq]))
            classifier = l2l.nn.PrototypicalClassifier(embedded[: len(xs)], ys)
            return criterion(classifier(embedded[len(xs) :]), yq)

        return _over_tasks(problem, prototypes)
    maml = l2l.algorithms.MAML(model, lr=w.lr, first_order=False)

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(w.steps):
            learner.adapt(criterion(learner(xs), ys))
        return criterion(learner(xq), yq)

    return _over_tasks(problem, task)


def _easyfsl(problem: Problem) -> Prepared:
    """Its own scores are -d, of queries that went through the backbone alone; the workload's are -d^2, and an episode's
    batch statistics those of both sets together: so embedded first, and squared."""
    methods = importlib.import_module("easyfsl.methods")
    model, criterion = _plain(problem)
    classifier = methods.PrototypicalNetworks()

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        embedded = model(torch.cat([xs, xq]))
        classifier.process_support_set(embedded[: len(xs)], ys)
        return criterion(-classifier(embedded[len(xs) :]).square(), yq)

    return _over_tasks(problem, task)


def _higher(problem: Problem) -> Prepared:
    higher = importlib.import_module("higher")
    w, (model, criterion) = problem.workload, _plain(problem)
    optimizer = torch.optim.SGD(model.parameters(), lr=w.lr)

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, track_higher_grads=True) as (
            net,
            inner,
        ):
            for _ in range(w.steps):
                inner.step(criterion(net(xs), ys))
            return criterion(net(xq), yq)

    return _over_tasks(problem, task)


def _torchopt(problem: Problem) -> Prepared:
    torchopt = importlib.import_module("torchopt")
    w, (model, criterion) = problem.workload, _plain(problem)
    inner = torchopt.MetaSGD(model, lr=w.lr)

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        kept = torchopt.extract_state_dict(model, by="reference")
        kept_inner = torchopt.extract_state_dict(inner, by="reference")
        for _ in range(w.steps):
            inner.step(criterion(model(xs), ys))
        value = criterion(model(xq), yq)
        torchopt.recover_state_dict(model, kept)
        torchopt.recover_state_dict(inner, kept_inner)
        return value

    return _over_tasks(problem, task)


def compiled(problem: Problem, compiler: str = "inductor") -> Prepared:
    """``torch.compile`` of ``vmap(grad(task))``, the whole meta-step in one graph.

    Args:
        problem: a MAML one.
        compiler: torch.compile's backend.
    """
    w, (model, criterion) = problem.workload, _plain(problem)
    names = [name for name, _ in model.named_parameters()]
    parameters = tuple(p.detach() for p in model.parameters())
    Parameters = tuple[Tensor, ...]

    def forward(values: Parameters, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, dict(zip(names, values)), (x,))
        return outputs

    def task(values: Parameters, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(w.steps):
            grads = grad(lambda v: criterion(forward(v, xs), ys))(values)
            values = tuple(v - w.lr * g for v, g in zip(values, grads))
        return criterion(forward(values, xq), yq)

    def meta_gradient(values: Parameters, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Parameters:
        each = vmap(grad(task), in_dims=(None, 0, 0, 0, 0))(values, xs, ys, xq, yq)
        return tuple(g.mean(0) for g in each)

    # Without what was compiled for other problems: sizes seen to change would be compiled as variables, for the worse.
    torch.compiler.reset()
    run: Callable[..., Parameters] = torch.compile(meta_gradient, backend=compiler, fullgraph=True, dynamic=False)
    e, last = problem.episodes, list[Tensor]()

    def step() -> None:
        with torch.no_grad():
            last[:] = run(parameters, e.support_x, e.support_y, e.query_x, e.query_y)

    return Prepared(step, lambda: torch.cat([g.reshape(-1) for g in last]))


def _jax(problem: Problem) -> Prepared:
    model, _ = _plain(problem)
    return jax_prepared(problem, model)


# torch.compile was not done with Conv4 over five steps after nine minutes, and gained nothing over one; JAX: see there.
_DENSE = ("mlp", "omniglot_fc", "tanh_mlp")

LEARN2LEARN = Side("learn2learn", _learn2learn, ("maml", "protonets"), package="learn2learn")
EASYFSL = Side("easyfsl", _easyfsl, ("protonets",), package="easyfsl")
HIGHER = Side("higher", _higher, ("maml",), package="higher")
TORCHOPT = Side("TorchOpt", _torchopt, ("maml",), package="torchopt")
COMPILE = Side("torch.compile", compiled, ("maml",), _DENSE)
JAX = Side("JAX jit", _jax, ("maml",), _DENSE, package="jax")
