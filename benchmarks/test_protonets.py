"""ProtoNets: the head alone, forward and backward, and the whole training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import metafast as mf
from metafast.bench.sides import ACCUMULATE, AUTOGRAD, REFERENCE, Side
from metafast.checks import relative_error

Head = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
SIZES = [(32, 5, 1, 15, 64), (8, 60, 5, 5, 64), (4, 20, 5, 15, 1600)]  # tasks, ways, shots, queries a class, features


def metafast_head(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> Tensor:
    return mf.ops.prototype_loss(support, support_y, query, query_y, ways).mean()


def by_products(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> Tensor:
    """Batched PyTorch: class means by a product with the one-hot labels."""
    member = F.one_hot(support_y, ways).to(support.dtype)
    return _of_means(member.transpose(1, 2) @ support / member.sum(1).unsqueeze(-1), query, query_y)


def by_index(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> Tensor:
    """Batched PyTorch: class means by adding rows, which is faster with many classes."""
    tasks, _, features = support.shape
    row = (support_y + ways * torch.arange(tasks).unsqueeze(1)).flatten()
    sums = support.new_zeros(tasks * ways, features).index_add(0, row, support.flatten(0, 1))
    means = sums / torch.bincount(row, minlength=tasks * ways).unsqueeze(1)
    return _of_means(means.view(tasks, ways, features), query, query_y)


def _of_means(means: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    # Without |q|^2, which is the same for all classes and leaves the softmax as it is.
    squares = (means * means).sum(-1).unsqueeze(1)
    logits = torch.baddbmm(squares, query, means.transpose(1, 2), beta=-1, alpha=2)
    return F.cross_entropy(logits.flatten(0, 1), query_y.flatten())


@pytest.mark.parametrize("head", [metafast_head, by_products, by_index], ids=["metafast", "products", "index"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_head(size: tuple[int, ...], head: Head, benchmark: BenchmarkFixture) -> None:
    tasks, ways, shots, queries, features = size
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(tasks, ways * shots, features, generator=generator) / features**0.5
    query = torch.randn(tasks, ways * queries, features, generator=generator) / features**0.5
    support_y = torch.arange(ways).repeat(shots).expand(tasks, -1).contiguous()
    query_y = torch.arange(ways).repeat(queries).expand(tasks, -1).contiguous()

    def gradients(head: Head, support: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        leaves = [support.detach().requires_grad_(), query.detach().requires_grad_()]
        return torch.autograd.grad(head(leaves[0], support_y, leaves[1], query_y, ways), leaves)

    def plain_head(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> Tensor:
        means = torch.stack([support[:, support_y[0] == c].mean(1) for c in range(ways)], dim=1)
        logits = -torch.cdist(query, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        return F.cross_entropy(logits.flatten(0, 1), query_y.flatten())

    wanted = gradients(plain_head, support.double(), query.double())
    for found, exact in zip(gradients(head, support, query), wanted):
        assert relative_error(found, exact) < 1e-5
    benchmark.group = f"prototype head (T, ways, shots, queries, D) = {size}, forward and backward"
    benchmark(gradients, head, support, query)


@pytest.mark.parametrize("side", [AUTOGRAD, ACCUMULATE, REFERENCE], ids=lambda side: side.name)
def test_training_step(side: Side, meta_step: Callable[[str, Side], None]) -> None:
    meta_step("protonets-conv4-64", side)
