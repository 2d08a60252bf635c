"""The learned optimiser that starts as gradient descent."""

from __future__ import annotations

import pytest
import torch

import metafast as mf
from metafast.cli.descent import start_as_descent


@pytest.mark.parametrize("limit", [0.5, 1.0, 10.0])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (3, 1), (5, 3)])
def test_it_starts_as_descent_and_levels_off(limit: float, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    optimizer = start_as_descent(mf.LSTMOptimizer(hidden, layers).double(), limit)
    sizes = torch.tensor([1e-4, 1e-3, 1e-2], dtype=torch.float64) * limit
    grads = torch.cat([sizes, -sizes])
    updates, state = optimizer(grads, optimizer.init(6))
    assert updates.tolist() == pytest.approx(grads.tolist(), rel=0.02)
    # What is carried over from step to step adds little.
    for _ in range(4):
        updates, state = optimizer(grads, state)
    assert (updates / grads).tolist() == pytest.approx([1.0] * 6, abs=0.2)
    large, _ = optimizer(limit * torch.tensor([0.3, 1.0, 100.0, 1e4], dtype=torch.float64), optimizer.init(4))
    assert all(a < b for a, b in zip(large.tolist(), large.tolist()[1:]))
    assert 0.3 * limit < large[1] < large[3] < limit


def test_lomaml_then_starts_as_maml() -> None:
    torch.manual_seed(0)
    model = mf.models.MLP(1, (8, 8), 1).double()
    episodes = mf.data.Sinusoid().sample(5, 10, 10, torch.Generator().manual_seed(0), torch.float64)
    optimizer = start_as_descent(mf.LSTMOptimizer().double(), limit=1000.0)
    lomaml = mf.LOMAML(model, optimizer, lr=0.01, steps=1, loss="mse")
    maml = mf.MAML(model, lr=0.01, steps=1, loss="mse")
    learned = lomaml.adapt(episodes.support_x, episodes.support_y).parameters
    for name, value in maml.adapt(episodes.support_x, episodes.support_y).parameters.items():
        start = dict(model.named_parameters())[name]
        assert torch.linalg.norm(learned[name] - value) < 0.02 * torch.linalg.norm(value - start)
