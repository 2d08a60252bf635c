"""MAML on sinusoids as one writes it for learn2learn: a clone a task, a loss a step. Only the import is another."""

from __future__ import annotations

import torch
from torch import nn

import metafast as mf
import metafast.l2l as l2l


def main(
    iterations: int = 1000, tasks: int = 25, shots: int = 10, steps: int = 5, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Query losses by iteration."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    maml = l2l.algorithms.MAML(mf.models.MLP(1, (40, 40), 1).to(dtype), lr=0.01, first_order=False)
    opt = torch.optim.Adam(maml.parameters(), 3e-3)
    loss = nn.MSELoss()
    curve = []
    for iteration in range(iterations):
        batch = mf.data.Sinusoid().sample(tasks, shots, shots, generator).to(dtype=dtype)
        error = torch.zeros((), dtype=dtype)
        for x_support, y_support, x_query, y_query in zip(
            batch.support_x, batch.support_y, batch.query_x, batch.query_y
        ):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(loss(learner(x_support), y_support))
            error = error + loss(learner(x_query), y_query) / tasks
        opt.zero_grad()
        error.backward()
        opt.step()
        curve.append(error.item())
        if iteration % 100 == 0:
            print(f"iteration {iteration}: query loss {curve[-1]:.4f}")
    return curve


if __name__ == "__main__":
    main()
