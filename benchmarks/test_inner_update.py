"""``mf.ops.inner_update`` against torch's own expression, for nets from the sinusoid's to a large convolution's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import metafast as mf
from metafast.checks import relative_error

Update = Callable[[Tensor, Tensor, "Tensor | float"], Tensor]


def expression(params: Tensor, grads: Tensor, lr: Tensor | float) -> Tensor:
    return params - lr * grads


@pytest.mark.parametrize("update", [mf.ops.inner_update, expression], ids=["metafast", "torch"])
@pytest.mark.parametrize("rate", ["number", "P"])
@pytest.mark.parametrize(("tasks", "width"), [(1, 1761), (25, 1761), (4, 112_453), (32, 112_453)])
def test_inner_update(tasks: int, width: int, rate: str, update: Update, benchmark: BenchmarkFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    params, grads = torch.randn(2, tasks, width, generator=generator)
    lr = 0.01 if rate == "number" else torch.rand(width, generator=generator)
    exact = params.double() - (lr.double() if isinstance(lr, Tensor) else lr) * grads.double()
    assert relative_error(update(params, grads, lr), exact) < 1e-7
    benchmark.group = f"inner_update ({tasks}, {width}), lr {rate}"
    benchmark(update, params, grads, lr)


@pytest.mark.parametrize("update", [mf.ops.inner_update, expression], ids=["metafast", "torch"])
def test_forward_and_backward(update: Update, benchmark: BenchmarkFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    params, grads, cotangent = torch.randn(3, 25, 1761, generator=generator)
    lr = torch.rand(1761, generator=generator)
    leaves = [t.requires_grad_() for t in (params, grads, lr)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(update(*leaves), leaves, cotangent)

    exact = (cotangent, -lr * cotangent, -(grads * cotangent).sum(0))
    for found, wanted in zip(step(), exact):
        assert relative_error(found, wanted) < 1e-6
    benchmark.group = "inner_update forward and backward (25, 1761), lr (P,)"
    benchmark(step)
