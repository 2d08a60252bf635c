"""Other libraries' meta-gradients, each in the idiom of its own documentation.

They run on the same modules, with running statistics taken out of the batch norms: none of them needs any, they cost
time, and ``vmap`` cannot write them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from metafast.bench.peers_func import compiled, grad_of_vmap, plain, torchopt_vmap, vmap_of_grad
from metafast.bench.peers_jax import jax_prepared
from metafast.bench.sides import Prepared, Side, by_backward
from metafast.bench.workloads import Problem


def _over_tasks(problem: Problem, task: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """A side that goes through the tasks one by one: ``task`` gives the query loss of one."""
    e = problem.episodes

    def loss() -> Tensor:
        losses = [task(*sets) for sets in zip(e.support_x, e.support_y, e.query_x, e.query_y)]
        return torch.stack(losses).mean()

    return by_backward(problem, loss)


def _learn2learn(problem: Problem) -> Prepared:
    l2l = importlib.import_module("learn2learn")
    w, (model, criterion) = problem.workload, plain(problem)
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
    model, criterion = plain(problem)
    classifier = methods.PrototypicalNetworks()

    def task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        embedded = model(torch.cat([xs, xq]))
        classifier.process_support_set(embedded[: len(xs)], ys)
        return criterion(-classifier(embedded[len(xs) :]).square(), yq)

    return _over_tasks(problem, task)


def _higher(problem: Problem) -> Prepared:
    higher = importlib.import_module("higher")
    w, (model, criterion) = problem.workload, plain(problem)
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
    w, (model, criterion) = problem.workload, plain(problem)
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


def _jax(problem: Problem) -> Prepared:
    model, _ = plain(problem)
    return jax_prepared(problem, model)


# torch.compile was not done with Conv4 over five steps after nine minutes, and gained nothing over one; JAX: see there.
_DENSE = ("mlp", "omniglot_fc", "tanh_mlp")

# vmap makes convolutions with a task's own weights grouped ones, which torch goes through slowly on a CPU: 5 to 20 s
# for the smallest Conv4 row.
_SLOW = ("conv4",)

LEARN2LEARN = Side("learn2learn", _learn2learn, ("maml", "protonets"), package="learn2learn")
EASYFSL = Side("easyfsl", _easyfsl, ("protonets",), package="easyfsl")
HIGHER = Side("higher", _higher, ("maml",), package="higher")
TORCHOPT = Side("TorchOpt", _torchopt, ("maml",), package="torchopt")
TORCHOPT_VMAP = Side("TorchOpt, vmap", torchopt_vmap, ("maml",), untimed=_SLOW, package="torchopt")
FUNC_USUAL = Side("torch.func, grad(vmap)", grad_of_vmap, ("maml",), untimed=_SLOW)
FUNC = Side("torch.func, vmap(grad)", vmap_of_grad, ("maml",), untimed=_SLOW)
COMPILE = Side("torch.compile", compiled, ("maml",), _DENSE)
JAX = Side("JAX jit", _jax, ("maml",), _DENSE, package="jax")
