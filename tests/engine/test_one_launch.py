"""MAML's meta-step of a small MLP, which on a GPU is one launch: learners come to it, and no other network does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast import _native
from metafast.learners.base import GradientLearner
from metafast.reference import maml
from tests.backends import in_every_order, kernels_of, one_launch, poisoned

pytestmark = kernels_of("simt")
TASKS, SHOTS, QUERIES, STEPS, LR = 3, 4, 5, 2, 0.2
BAR = 1e-10


def linears(*widths: int, act: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, to in itertools.pairwise(widths):
        layers += [nn.Linear(wide, to, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


class Functional(nn.Module):
    """Layers registered in another order than they come in."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        self.first = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


def mixed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


ONE = {
    "relu": lambda: linears(6, 7, 5, 3),
    "tanh": lambda: linears(6, 17, 3, act=nn.Tanh),
    "narrow": lambda: linears(6, 1, 1, 3),
    "one-layer": lambda: linears(6, 3),
    "eight-layers": lambda: linears(6, 5, 4, 3, 2, 3, 4, 5, 3),
    "flatten": lambda: nn.Sequential(nn.Flatten(), *linears(6, 9, 3)),
    "model": lambda: mf.models.MLP(6, (8, 8), 3),
}
OTHERS = {
    "no-bias": lambda: linears(6, 7, 3, bias=False),
    "gelu": lambda: linears(6, 7, 3, act=nn.GELU),
    "mixed": mixed,
    "other-order": Functional,
    "two-linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
    "relu-twice": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)),
    "relu-last": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU()),
    "tanh-last": lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()),
    "relu-first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)),
    "nine-layers": lambda: linears(6, 5, 4, 3, 2, 2, 2, 2, 2, 3),
    "norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
    "too-large": lambda: linears(6, 2100, 3),
}


def network(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def episodes(loss: str) -> mf.Episodes:
    torch.manual_seed(1)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, samples, 2, 3, dtype=torch.float64).flatten(2)
        if loss == "mse":
            return x, torch.randn(TASKS, samples, 3, dtype=torch.float64)
        return x, torch.randint(3, (TASKS, samples))

    return mf.Episodes(*side(SHOTS), *side(QUERIES))


def launches_of_one(work: Callable[[], Any]) -> bool:
    """Whether a block did a task: besides are theta's copy, the accuracy, the sum over tasks and two copies back."""
    module: Any = _native.native()
    before = module.simt_launches()
    work()
    return bool(module.simt_launches() - before <= 6)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def check(name: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        scale = max(float(exact.detach().norm()), 1e-3)
        assert float((mine.detach() - exact.detach()).norm()) / scale <= BAR, name


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ONE)
def test_both_doors_against_the_reference(name: str, loss: str, first_order: bool) -> None:
    model, e = network(ONE[name]), episodes(loss)
    weights = torch.tensor([0.2, 1.5, -0.3], dtype=torch.float64)
    exact = maml(model, e, lr=LR, steps=STEPS, loss=loss, first_order=first_order, weights=weights)
    wanted = list(torch.autograd.grad(exact.loss, list(model.parameters())))
    accuracy = [] if exact.accuracy is None else [exact.accuracy]
    results = [exact.loss, exact.losses, exact.logits, *accuracy]
    with mf.use_backend("simt"), poisoned():
        learner = mf.MAML(model, LR, STEPS, loss, first_order)

        def accumulate() -> list[Tensor]:
            model.zero_grad()
            out = learner.accumulate_grad(e, weights)
            rest = [] if out.accuracy is None else [out.accuracy]
            return [*gradients(model), out.loss, out.losses, out.logits, *rest]

        assert launches_of_one(accumulate)
        check("accumulate_grad", in_every_order("simt", accumulate), wanted + results)
        model.zero_grad()
        out = learner(e, weights)
        out.loss.backward()
        check("backward", gradients(model), wanted)
        with torch.no_grad():
            assert launches_of_one(lambda: learner(e, weights))
            still = learner(e, weights)
        check("no_grad", [still.loss, still.losses, still.logits], results[:3])
        with one_launch(False):
            assert not launches_of_one(accumulate)
            check("general way", accumulate(), wanted + results)


def test_any_cotangent() -> None:
    model, e = network(ONE["relu"]), episodes("cross_entropy")
    params = list(model.parameters())

    def objective(out: Any) -> Tensor:
        total: Tensor = out.loss + (out.losses * torch.arange(TASKS)).sum() + out.logits.square().mean()
        return total

    wanted = torch.autograd.grad(objective(maml(model, e, lr=LR, steps=STEPS)), params)
    with mf.use_backend("simt"):
        found = torch.autograd.grad(objective(mf.MAML(model, LR, STEPS)(e)), params)
    check("cotangents", list(found), list(wanted))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_steps(steps: int) -> None:
    model, e = network(ONE["tanh"]), episodes("mse")
    exact = maml(model, e, lr=LR, steps=steps, loss="mse")
    wanted = list(torch.autograd.grad(exact.loss, list(model.parameters())))
    with mf.use_backend("simt"), poisoned():
        learner = mf.MAML(model, LR, steps, "mse")
        assert launches_of_one(lambda: learner.accumulate_grad(e))
    check("steps", gradients(model), wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_go_the_general_way(name: str) -> None:
    model, e = network(OTHERS[name]), episodes("cross_entropy")
    exact = maml(model, e, lr=LR, steps=STEPS)
    wanted = list(torch.autograd.grad(exact.loss, list(model.parameters())))
    with mf.use_backend("simt"):
        learner = mf.MAML(model, LR, STEPS)
        assert not launches_of_one(lambda: learner.accumulate_grad(e))
    check(name, gradients(model), wanted)


@pytest.mark.parametrize(
    "learner",
    [
        lambda model: GradientLearner(model, mf.LearnedRates(model, LR), STEPS),
        lambda model: GradientLearner(model, mf.Momentum(LR, 0.5), STEPS),
        lambda model: mf.MAML(model, LR, STEPS, adapts=["4"]),
        lambda model: mf.MAML(model, LR, STEPS, support_batch=2),
        lambda model: mf.MAML(model, LR, STEPS, query_weights=[0.5, 0.5]),
        lambda model: mf.LOMAML(model, mf.LSTMOptimizer(3, 1), LR, STEPS),
    ],
    ids=["rates", "momentum", "subset", "minibatches", "query-weights", "learned"],
)
def test_other_rules_go_the_general_way(learner: Callable[[nn.Module], Any]) -> None:
    e = episodes("cross_entropy")
    with mf.use_backend("simt"):
        one = learner(network(ONE["relu"])).double()
        assert not launches_of_one(lambda: one.accumulate_grad(e))
