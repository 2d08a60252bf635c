"""Gradients that are summed over tasks as they come, short ones by groups of tasks: any cotangent, any threads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import native
from tests.nets import gradient, relative_error

BAR = 1e-10
# Features of the net, and tasks: more than 1 MiB of gradients, of a number of parameters that is no whole number of
# chunks; groups of two tasks, of two and a last one alone, of three and a last two, and of none.
SIZES = {"long": (121, 83, 37, 13), "16": (7, 9, 5, 16), "17": (7, 9, 5, 17), "29": (7, 9, 5, 29), "15": (7, 9, 5, 15)}
on_sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(autouse=True)
def native_backend() -> object:
    with mf.use_backend("cpu"):
        yield


def problem(size: str) -> tuple[nn.Module, mf.Episodes, Tensor]:
    torch.manual_seed(0)
    features, wide, narrow, tasks = SIZES[size]
    model = nn.Sequential(
        nn.Linear(features, wide), nn.BatchNorm1d(wide), nn.Tanh(), nn.Linear(wide, narrow), nn.Linear(narrow, 5)
    ).double()
    x, y = torch.randn(tasks, 15, features, dtype=torch.float64), torch.randint(5, (tasks, 15))
    return model, mf.Episodes(x[:, :7], y[:, :7], x[:, 7:], y[:, 7:]), torch.rand(tasks, dtype=torch.float64)


OBJECTIVES = {
    "loss": lambda out: out.loss,
    "scaled loss": lambda out: -0.3 * out.loss,
    "losses": lambda out: (out.losses**2).sum(),
    "logits": lambda out: (out.logits.tanh() * 0.3).sum(),
    "all": lambda out: 2 * out.loss + out.losses.sin().sum() + out.logits.square().mean(),
}


@native
@on_sizes
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_any_cotangent(objective: str, steps: int, size: str) -> None:
    model, episodes, weights = problem(size)
    maml = mf.MAML(model, lr=0.1, steps=steps)
    value = OBJECTIVES[objective](maml(episodes, weights))
    value.backward(retain_graph=True)
    once = gradient(model)
    value.backward()
    assert relative_error(gradient(model), 2 * once) <= 1e-14
    model.zero_grad()
    OBJECTIVES[objective](mf.reference.maml(model, episodes, lr=0.1, steps=steps, weights=weights)).backward()
    assert relative_error(once, gradient(model)) <= BAR
    # What was asked for once is kept from then on: the same numbers by another way.
    wanted = gradient(model)
    model.zero_grad()
    OBJECTIVES[objective](maml(episodes, weights)).backward()
    assert relative_error(gradient(model), wanted) <= BAR


@native
@on_sizes
@pytest.mark.parametrize("rule", ["sgd", "first order", "lstm", "rates", "protonets"])
def test_every_kind_of_step_and_the_same_bits_with_any_number_of_threads(rule: str, size: str) -> None:
    model, episodes, weights = problem(size)
    wanted_model = copy.deepcopy(model)
    found = {}
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        net = copy.deepcopy(model)
        learner: nn.Module
        if rule == "lstm":
            learner = mf.LOMAML(net, mf.LSTMOptimizer(3).double(), lr=0.1, steps=2)
        elif rule == "rates":
            learner = mf.GradientLearner(net, mf.LearnedRates(net, 0.1), steps=2)
        elif rule == "protonets":
            net[-1].weight.data.mul_(3)
            y = torch.arange(5).repeat(len(weights), 3)
            episodes = mf.Episodes(episodes.support_x[:, :5], y[:, :5], episodes.query_x, y[:, :8])
            learner = mf.ProtoNets(net)
        else:
            learner = mf.MAML(net, lr=0.1, steps=2, first_order=rule == "first order")
        learner.accumulate_grad(episodes, weights)
        found[threads] = gradient(learner)
        learner.zero_grad()
        learner(episodes, weights).loss.backward()
        assert torch.equal(gradient(learner), found[threads])
    for one in found.values():
        assert torch.equal(one, found[1])
    if rule in ("sgd", "first order"):
        first_order = rule == "first order"
        mf.reference.maml(
            wanted_model, episodes, lr=0.1, steps=2, first_order=first_order, weights=weights
        ).loss.backward()
        assert relative_error(found[1], gradient(wanted_model)) <= BAR
