"""tests/orders.py finds results that hang on the order of threads and blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests import orders
from tests.backends import kernels_of

pytestmark = kernels_of("simt")


def test_results_that_hang_on_the_order_are_found() -> None:
    calls = itertools.count()
    with pytest.raises(AssertionError, match="order 1 of threads and blocks differs"):
        orders._values(lambda: torch.tensor(float(next(calls))))()


def test_gradients_that_hang_on_the_order_are_found() -> None:
    calls, weight = itertools.count(), torch.zeros(2, requires_grad=True)
    arguments: list[Any] = [None, [weight], *[None] * 12, []]

    def accumulate(*_: Any) -> tuple[torch.Tensor]:
        added = torch.full((2,), float(next(calls)))
        weight.grad = added if weight.grad is None else weight.grad + added
        return (torch.zeros(()),)

    with pytest.raises(AssertionError, match="order 1 of threads and blocks differs"):
        orders._accumulated(accumulate)(*arguments)

    def step(*_: Any) -> tuple[torch.Tensor]:
        return ((weight * float(next(calls))).sum(),)

    with pytest.raises(AssertionError, match="order 1 of threads and blocks differs"):
        orders._differentiable(step)(*arguments)


def test_gradients_are_added_once() -> None:
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.ones(2)

    def accumulate(*_: Any) -> tuple[torch.Tensor]:
        assert weight.grad is not None
        weight.grad += 2
        return (torch.zeros(()),)

    orders._accumulated(accumulate)(None, [weight], *[None] * 12, [])
    assert weight.grad.tolist() == [3, 3]
