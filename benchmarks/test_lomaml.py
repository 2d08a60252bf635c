"""LOMAML: the LSTM rule alone, over five steps forward and backward, and the whole meta-step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import metafast as mf
from metafast.bench.sides import ACCUMULATE, AUTOGRAD, REFERENCE, Side
from metafast.checks import relative_error

Rule = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]
STEPS = 5


def plain_step(grads: Tensor, state: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A step as one would write it for speed in PyTorch: the four gates by one product for inputs and one for h."""
    size = grads.abs().clamp(min=math.exp(-10.0))
    large = grads.abs() >= math.exp(-10.0)
    z = torch.stack((size.log() / 10.0, torch.where(large, grads.sign(), grads * math.exp(10.0))), dim=1)
    carried = []
    for layer, (h, c) in enumerate(state):
        w, v, b = weights[3 * layer : 3 * layer + 3]
        i, f, m, o = torch.addmm(torch.addmm(b, z, w.t()), h, v.t()).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * m.tanh()
        z = o.sigmoid() * c.tanh()
        carried.append(torch.stack((z, c)))
    return torch.addmv(weights[-1], z, weights[-2]), torch.stack(carried)


def by_steps(step: Rule) -> Rule:
    """The rule of (K, N) gradients from that of one step."""

    def run(grads: Tensor, state: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = []
        for g in grads:
            updates, state = step(g, state, weights)
            rows.append(updates)
        return torch.stack(rows), state

    return run


RULES = {
    "metafast": mf.ops.lstm_update,
    "metafast, a step a call": by_steps(mf.ops.lstm_update),
    "torch": by_steps(plain_step),
    "torch, a gate at a time": by_steps(mf.reference.lstm_step),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, benchmark: BenchmarkFixture) -> None:
    coordinates = 25 * 1761 if benchmark.enabled else 100
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer()
    grads = torch.randn(STEPS, coordinates)

    def gradients(rule: Rule, optimizer: mf.LSTMOptimizer, grads: Tensor) -> list[Tensor]:
        leaf = grads.detach().requires_grad_()
        updates, _ = rule(leaf, optimizer.init(coordinates), list(optimizer.weights))
        return list(torch.autograd.grad((updates**2).sum(), [leaf, *optimizer.weights]))

    found = gradients(RULES[name], optimizer, grads)
    wanted = gradients(RULES["torch, a gate at a time"], optimizer.double(), grads.double())
    optimizer.float()
    for mine, exact in zip(found, wanted):
        assert relative_error(mine, exact) < 1e-5
    benchmark.group = f"LSTM rule, {coordinates:,} coordinates, {STEPS} steps, forward and backward"
    benchmark(gradients, RULES[name], optimizer, grads)


@pytest.mark.parametrize("side", [AUTOGRAD, ACCUMULATE, REFERENCE], ids=lambda side: side.name)
def test_meta_step(side: Side, meta_step: Callable[[str, Side], None]) -> None:
    meta_step("lomaml-sinusoid", side)
