"""hvp, lstm_update and the prototype head against plain float64 expressions, gradcheck and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast as mf
from tests.nets import relative_error


def explicit_logits(support: Tensor, labels: Tensor, query: Tensor, ways: int, metric: str) -> Tensor:
    tasks = []
    for s, y, q in zip(support, labels, query):
        means = torch.stack([s[y == c].mean(0) for c in range(ways)])
        if metric == "cosine":
            tasks.append(F.cosine_similarity(q[:, None], means[None], dim=-1))
        else:
            tasks.append(-((q[:, None] - means[None]) ** 2).sum(-1))
    return torch.stack(tasks)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize(
    ("tasks", "ways", "shots", "queries", "features"), [(1, 1, 1, 1, 1), (3, 5, 2, 7, 17), (2, 20, 1, 3, 64)]
)
def test_prototypes(tasks: int, ways: int, shots: int, queries: int, features: int, metric: str) -> None:
    torch.manual_seed(0)
    support = torch.randn(tasks, ways * shots, features, dtype=torch.float64) + 3.0
    query = torch.randn(tasks, queries, features, dtype=torch.float64) + 3.0
    # Labels in any order, another one in each task.
    labels = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(ways * shots)] for _ in range(tasks)])
    wanted = explicit_logits(support, labels, query, ways, metric)
    assert torch.allclose(mf.ops.prototype_logits(support, labels, query, ways, metric), wanted, rtol=1e-12, atol=1e-12)
    query_labels = torch.randint(ways, (tasks, queries))
    losses = mf.ops.prototype_loss(support, labels, query, query_labels, ways, metric)
    plain = torch.stack([F.cross_entropy(f, y) for f, y in zip(wanted, query_labels)])
    assert torch.allclose(losses, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_prototype_derivatives(metric: str) -> None:
    torch.manual_seed(0)
    support = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    labels, query_labels = torch.arange(3).repeat(2, 2), torch.randint(3, (2, 4))

    def loss(support: Tensor, query: Tensor) -> Tensor:
        return mf.ops.prototype_loss(support, labels, query, query_labels, 3, metric)

    assert torch.autograd.gradcheck(loss, (support, query))
    assert torch.autograd.gradgradcheck(loss, (support, query))


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "support", {"support": torch.zeros(2, 6)}),
        (ValueError, "query", {"query": torch.zeros(3, 4, 3)}),
        (ValueError, "query", {"query": torch.zeros(2, 4, 5)}),
        (TypeError, "query", {"query": torch.zeros(2, 4, 3, dtype=torch.float64)}),
        (TypeError, "support_labels", {"support_labels": torch.zeros(2, 6)}),
        (ValueError, "support_labels", {"support_labels": torch.full((2, 6), 3)}),
        (ValueError, "support_labels", {"support_labels": torch.zeros(2, 6, dtype=torch.int64)}),
        (ValueError, "ways", {"ways": 0}),
        (TypeError, "ways", {"ways": 3.0}),
        (ValueError, "metric", {"metric": "l1"}),
        (ValueError, "query_labels", {"query_labels": torch.full((2, 4), -1)}),
        (ValueError, "query_labels", {"query_labels": torch.zeros(2, 5, dtype=torch.int64)}),
    ],
)
def test_prototype_arguments(error: type[Exception], name: str, change: dict[str, object]) -> None:
    arguments = {
        "support": torch.zeros(2, 6, 3),
        "support_labels": torch.arange(3).repeat(2, 2),
        "query": torch.zeros(2, 4, 3),
        "query_labels": torch.zeros(2, 4, dtype=torch.int64),
        "ways": 3,
    } | change
    with pytest.raises(error, match=f"^{name}: "):
        mf.ops.prototype_loss(**arguments)


@pytest.mark.parametrize(("layers", "hidden", "count"), [(1, 1, 1), (2, 20, 13), (3, 4, 7)])
def test_lstm_update(layers: int, hidden: int, count: int) -> None:
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer(hidden=hidden, layers=layers).double()
    # Zero, both sides of exp(-p), signs, large values.
    grads = torch.tensor([0.0, 1e-6, -1e-6, 4e-5, -5e-5, 0.3, -2.0, 1e3, 1.0, -1.0, 7.0, 0.01, -0.02])[:count].double()
    state = torch.randn(layers, 2, count, hidden, dtype=torch.float64)
    updates, carried = mf.ops.lstm_update(grads, state, list(optimizer.weights))
    wanted, wanted_state = mf.reference.lstm_step(grads, state, list(optimizer.weights))
    assert relative_error(updates, wanted) < 1e-13
    assert relative_error(carried, wanted_state) < 1e-13


def test_lstm_update_derivatives_and_torchs_own_cell() -> None:
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer(hidden=3).double()
    grads = torch.tensor([0.3, -2.0, 0.04], dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = tuple(optimizer.weights)

    def update(grads: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return mf.ops.lstm_update(grads, state, weights)

    assert torch.autograd.gradcheck(update, (grads, state, *weights))
    assert torch.autograd.gradgradcheck(update, (grads, state, *weights))
    # An independent witness for the equations: torch.nn.LSTM with the same weights.
    lstm = nn.LSTM(2, 3, num_layers=2).double()
    with torch.no_grad():
        for layer in range(2):
            getattr(lstm, f"weight_ih_l{layer}").copy_(weights[3 * layer])
            getattr(lstm, f"weight_hh_l{layer}").copy_(weights[3 * layer + 1])
            getattr(lstm, f"bias_ih_l{layer}").copy_(weights[3 * layer + 2])
            getattr(lstm, f"bias_hh_l{layer}").zero_()
    inputs = torch.stack([grads.abs().log() / 10.0, grads.sign()], dim=-1)
    output, (h, c) = lstm(inputs.unsqueeze(0), (state[:, 0].contiguous(), state[:, 1].contiguous()))
    updates, carried = update(grads, state, *weights)
    assert torch.allclose(updates, output[0] @ weights[-2] + weights[-1], rtol=1e-13, atol=1e-14)
    assert torch.allclose(carried, torch.stack([h, c], dim=1), rtol=1e-13, atol=1e-14)


def test_lstm_gradients_are_finite_at_zero() -> None:
    optimizer = mf.LSTMOptimizer(hidden=2)
    grads = torch.zeros(4, requires_grad=True)
    updates, _ = optimizer(grads, optimizer.init(4))
    updates.sum().backward()
    assert torch.isfinite(grads.grad).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grads", {"grads": torch.zeros(2, 3, 1)}),
        ("grads", {"grads": torch.zeros(3, dtype=torch.int64)}),
        ("state", {"state": torch.zeros(2, 2, 4, 5)}),
        ("weights", {"weights": [torch.zeros(1)] * 4}),
        ("weights", {"weights": [torch.zeros(20, 3), *list(mf.LSTMOptimizer(5).weights)[1:]]}),
        ("p", {"p": -1.0}),
    ],
)
def test_lstm_arguments(name: str, change: dict[str, object]) -> None:
    arguments = {
        "grads": torch.zeros(3),
        "state": torch.zeros(2, 2, 3, 5),
        "weights": list(mf.LSTMOptimizer(5).weights),
    } | change
    with pytest.raises(ValueError, match=f"^{name}"):
        mf.ops.lstm_update(**arguments)


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


def test_hvp_of_a_function_and_of_a_module() -> None:
    torch.manual_seed(0)
    energy, x = Energy().double(), torch.randn(5, 3, dtype=torch.float64)
    params = {n: p.detach() for n, p in energy.named_parameters()}
    vector = {n: torch.randn_like(p) for n, p in params.items()}
    product = mf.ops.hvp(energy, params, vector, x)

    leaves = list(energy.parameters())
    grads = torch.autograd.grad(energy(x), leaves, create_graph=True)
    wanted = torch.autograd.grad(grads, leaves, list(vector.values()))
    for name, value in zip(params, wanted):
        assert torch.allclose(product[name], value, rtol=1e-11, atol=1e-13)

    a = torch.randn(6, 6, dtype=torch.float64)
    point, direction = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = mf.ops.hvp(lambda p, m: p @ m @ p, point, direction, a)
    assert torch.allclose(found, (a + a.T) @ direction, rtol=1e-12)


def test_hvp_arguments() -> None:
    def cube(p: Tensor) -> Tensor:
        return (p**3).sum()

    point = torch.ones(3)
    with pytest.raises(ValueError, match="^vector: expected shape"):
        mf.ops.hvp(cube, point, torch.ones(2))
    with pytest.raises(TypeError, match="^vector: expected dtype"):
        mf.ops.hvp(cube, point, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="^fn_or_module: expected a scalar"):
        mf.ops.hvp(lambda p: p, point, point)
    with pytest.raises(TypeError, match="^params: a module's parameters"):
        mf.ops.hvp(Energy(), point, point)
    with pytest.raises(ValueError, match="^vector: expected the names"):
        mf.ops.hvp(Energy(), {"a": point}, {"b": point})
    with pytest.raises(TypeError, match="^fn_or_module: expected"):
        mf.ops.hvp(3, point, point)
