"""The training of sine_before.py, all tasks of an iteration in one call: the same losses, to rounding."""

from __future__ import annotations

import torch

import metafast as mf


def main(
    iterations: int = 1000, tasks: int = 25, shots: int = 10, steps: int = 5, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Query losses by iteration."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    maml = mf.MAML(mf.models.MLP(1, (40, 40), 1).to(dtype), lr=0.01, steps=steps, loss="mse")
    opt = torch.optim.Adam(maml.parameters(), 3e-3)
    curve = []
    for iteration in range(iterations):
        out = maml(mf.data.Sinusoid().sample(tasks, shots, shots, generator).to(dtype=dtype))
        opt.zero_grad()
        out.loss.backward()
        opt.step()
        curve.append(out.loss.item())
        if iteration % 100 == 0:
            print(f"iteration {iteration}: query loss {curve[-1]:.4f}")
    return curve


if __name__ == "__main__":
    main()
