"""Who takes part: what each side needs, which workloads it can do, and how it makes a meta-gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions

from torch import Tensor, nn

from metafast import reference
from metafast.backend import use_backend
from metafast.bench.workloads import Problem, Workload
from metafast.checks.compare import flat_gradient
from metafast.episodes import Outcome
from metafast.learners import LOMAML, MAML, ProtoNets


@dataclass(frozen=True)
class Prepared:
    """A side with a problem in hand: ``step`` makes one meta-gradient, ``gradient`` fetches the last one, flat."""

    step: Callable[[], object]
    gradient: Callable[[], Tensor]


@dataclass(frozen=True)
class Side:
    """One competitor.

    Attributes:
        name: for people.
        prepare: takes a problem, of which it may change everything, and gets ready.
        learners: of "maml", "lomaml" and "protonets", those that it has.
        nets: the networks that it can do, or does in bearable time; all when empty.
        untimed: the networks on which its gradient is checked and no more, since a meta-step takes it minutes.
        package: distribution that it needs; None where metafast and torch suffice.
        ours: metafast itself, whose mistakes are errors; the reference loops count as the others'.
        devices: types of device that it is for.
        by_torch: of metafast's own, the one that has no kernels at all.
    """

    name: str
    prepare: Callable[[Problem], Prepared]
    learners: tuple[str, ...] = ("maml", "lomaml", "protonets")
    nets: tuple[str, ...] = ()
    untimed: tuple[str, ...] = ()
    package: str | None = None
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    by_torch: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or self.version is not None

    @property
    def version(self) -> str | None:
        """Version of its package; None where it has none or is not installed."""
        found = [] if self.package is None else list(distributions(name=self.package))
        return found[0].version if found else None

    def obstacle(self, workload: Workload) -> str:
        """Why it does not take part in a workload: a few words, none if it does."""
        if workload.learner not in self.learners:
            return f"no {workload.learner}"
        if self.nets and workload.net not in self.nets:
            return f"not for {workload.net}"
        return "" if self.installed else "not installed"


def by_backward(problem: Problem, loss: Callable[[], Tensor]) -> Prepared:
    """A side whose step is ``loss().backward()`` into the ``.grad`` of the problem's parameters."""
    parameters = problem.parameters()

    def step() -> None:
        clear(parameters)
        loss().backward()

    return Prepared(step, lambda: flat_gradient(parameters))


def clear(parameters: list[nn.Parameter]) -> None:
    """Forget the ``.grad`` of all parameters."""
    for parameter in parameters:
        parameter.grad = None


def _learner(problem: Problem) -> MAML | LOMAML | ProtoNets:
    w = problem.workload
    if w.learner == "protonets":
        return ProtoNets(problem.model)
    if w.learner == "lomaml":
        return LOMAML(problem.model, problem.optimizer, lr=w.lr, steps=w.steps, loss=w.loss)
    return MAML(problem.model, lr=w.lr, steps=w.steps, loss=w.loss)


def _autograd(problem: Problem) -> Prepared:
    learner = _learner(problem)

    def loss() -> Tensor:
        out: Outcome = learner(problem.episodes)
        return out.loss

    return by_backward(problem, loss)


def _accumulate_grad(problem: Problem) -> Prepared:
    learner, parameters = _learner(problem), problem.parameters()

    def step() -> None:
        clear(parameters)
        learner.accumulate_grad(problem.episodes)

    return Prepared(step, lambda: flat_gradient(parameters))


def _graph(problem: Problem) -> Prepared:
    """``accumulate_grad`` recorded once as a CUDA graph, and replayed: no launch costs the host anything."""
    parameters = problem.parameters()
    captured = _learner(problem).capture(problem.episodes)

    def step() -> None:
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()
        captured(problem.episodes)

    return Prepared(step, lambda: flat_gradient(parameters))


def _torch_backend(problem: Problem) -> Prepared:
    inner = _accumulate_grad(problem)

    def step() -> None:
        with use_backend("torch"):
            inner.step()

    return Prepared(step, inner.gradient)


def _reference(problem: Problem) -> Prepared:
    return by_backward(problem, lambda: reference_outcome(problem).loss)


def reference_outcome(problem: Problem) -> Outcome:
    """What ``metafast.reference`` says of a problem."""
    w, model, episodes = problem.workload, problem.model, problem.episodes
    if w.learner == "protonets":
        return reference.protonets(model, episodes)
    if problem.optimizer is not None:
        return reference.lomaml(model, problem.optimizer, episodes, lr=w.lr, steps=w.steps, loss=w.loss)
    return reference.maml(model, episodes, lr=w.lr, steps=w.steps, loss=w.loss)


AUTOGRAD = Side("metafast", _autograd, ours=True)
ACCUMULATE = Side("accumulate_grad", _accumulate_grad, ours=True)
GRAPH = Side("accumulate_grad, graph", _graph, ours=True, devices=("cuda",))
TORCH_BACKEND = Side("torch backend", _torch_backend, ours=True, by_torch=True)
REFERENCE = Side("reference loop", _reference)
