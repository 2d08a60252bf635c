"""What the benchmarks share: a meta-step is first checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from metafast.bench.sides import Side
from metafast.bench.suites import EXACT, FLOAT32_BAR, gradient_error, reference_gradient
from metafast.bench.workloads import WORKLOADS, build

MetaStep = Callable[[str, Side], None]


@cache
def _wanted(name: str, shrunk: bool) -> Tensor:
    workload = WORKLOADS[name]
    return reference_gradient(build(workload.shrunk() if shrunk else workload))


@pytest.fixture
def meta_step(benchmark: BenchmarkFixture) -> MetaStep:
    """``meta_step(workload's name, side)``; at a small size unless the benchmarks are enabled."""

    def run(name: str, side: Side) -> None:
        workload = WORKLOADS[name]
        small = build(workload.shrunk())
        error = gradient_error(side.prepare(small.copy(torch.float64)), _wanted(name, True))
        assert error is not None and error < EXACT
        problem = build(workload) if benchmark.enabled else small
        prepared = side.prepare(problem.copy())
        if benchmark.enabled:
            error = gradient_error(prepared, _wanted(name, False))
            assert error is not None and error < FLOAT32_BAR
        benchmark.group = workload.title
        benchmark(prepared.step)

    return run


@pytest.fixture(autouse=True)
def _one_thread_unless_timed(benchmark: BenchmarkFixture) -> Iterator[None]:
    """Small and untimed, two threads only get in each other's way."""
    before = torch.get_num_threads()
    if not benchmark.enabled:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
