"""LOMAML: the LSTM rule alone, over five steps forward and backward, and the whole meta-step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import metafast as mf
from metafast.bench.sides import ACCUMULATE, AUTOGRAD, REFERENCE, Side
from metafast.checks import relative_error

Step = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]
STEPS = 5


@pytest.mark.parametrize("step", [mf.ops.lstm_update, mf.reference.lstm_step], ids=["metafast", "torch"])
def test_rule(step: Step, benchmark: BenchmarkFixture) -> None:
    coordinates = 25 * 1761 if benchmark.enabled else 100
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer()
    grads = torch.randn(STEPS, coordinates)

    def gradients(step: Step, optimizer: mf.LSTMOptimizer, grads: Tensor) -> list[Tensor]:
        leaf = grads.detach().requires_grad_()
        state, total = optimizer.init(coordinates), torch.zeros((), dtype=grads.dtype)
        for g in leaf:
            updates, state = step(g, state, list(optimizer.weights))
            total = total + (updates**2).sum()
        return list(torch.autograd.grad(total, [leaf, *optimizer.weights]))

    found = gradients(step, optimizer, grads)
    wanted = gradients(mf.reference.lstm_step, optimizer.double(), grads.double())
    optimizer.float()
    for mine, exact in zip(found, wanted):
        assert relative_error(mine, exact) < 1e-5
    benchmark.group = f"LSTM rule, {coordinates:,} coordinates, {STEPS} steps, forward and backward"
    benchmark(gradients, step, optimizer, grads)


@pytest.mark.parametrize("side", [AUTOGRAD, ACCUMULATE, REFERENCE], ids=lambda side: side.name)
def test_meta_step(side: Side, meta_step: Callable[[str, Side], None]) -> None:
    meta_step("lomaml-sinusoid", side)
