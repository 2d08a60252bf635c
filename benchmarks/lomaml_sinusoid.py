"""LOMAML against MAML on sinusoids, five inner steps each: who is nearer to waves never seen.

    python benchmarks/lomaml_sinusoid.py [--iterations 4000]

Both learn their initialisation with Adam, 1e-3 falling to 0 along a cosine, on the same batches of 25 tasks of 10 + 10
points; LOMAML learns its LSTM beside, begun as gradient descent. MAML is trained twice: for as many meta-steps, and for
14 times as many, since its meta-steps are cheaper. Writes the mean squared errors over the same 600 unseen tasks, with
95 % intervals of the mean, to ``benchmarks/results/lomaml-sinusoid.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import metafast as mf
from metafast.bench.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "lomaml-sinusoid.json"
STEPS, TASKS, POINTS, TEST_TASKS, LR, META_LR = 5, 25, 10, 600, 0.01, 1e-3


def maml(seed: int) -> mf.MAML:
    """MAML of the paper's network."""
    torch.manual_seed(seed)
    return mf.MAML(mf.models.MLP(1, (40, 40), 1), lr=LR, steps=STEPS, loss="mse")


def lomaml(seed: int) -> mf.LOMAML:
    """LOMAML of the same, whose first step is MAML's."""
    torch.manual_seed(seed)
    model = mf.models.MLP(1, (40, 40), 1)
    return mf.LOMAML(model, mf.LSTMOptimizer().start_as_descent(), lr=LR, steps=STEPS, loss="mse")


def train(learner: mf.MAML | mf.LOMAML, iterations: int, seed: int) -> None:
    """Train; ArithmeticError where the loss stops being a number."""
    generator = torch.Generator().manual_seed(seed)
    waves = mf.data.Sinusoid()
    adam = torch.optim.Adam(learner.parameters(), lr=META_LR)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        adam.zero_grad()
        out = learner.accumulate_grad(waves.sample(tasks=TASKS, shots=POINTS, queries=POINTS, generator=generator))
        if not torch.isfinite(out.loss):
            raise ArithmeticError(f"{type(learner).__name__}: the loss is {float(out.loss)}")
        adam.step()
        falling.step()


def test(learner: mf.MAML | mf.LOMAML) -> dict[str, float]:
    """The mean error over unseen tasks after adaptation, its 95 % interval, and the median."""
    generator = torch.Generator().manual_seed(2**31)
    unseen = mf.data.Sinusoid().sample(tasks=TEST_TASKS, shots=POINTS, queries=100, generator=generator)
    with torch.no_grad():
        losses = learner(unseen).losses.double()
    interval = 1.96 * float(losses.std()) / TEST_TASKS**0.5
    return {"mean": float(losses.mean()), "interval": interval, "median": float(losses.median())}


def main() -> None:
    """Train and test all; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4000, help="LOMAML's meta-steps")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        n = arguments.iterations
        for name, learner, iterations in (
            ("MAML", maml(seed), n),
            ("MAML, 14 times as long", maml(seed), 14 * n),
            ("LOMAML", lomaml(seed), n),
        ):
            train(learner, iterations, seed)
            rows.append({"learner": name, "seed": seed, "iterations": iterations, **test(learner)})
            print(rows[-1], flush=True)
    settings = {"steps": STEPS, "tasks": TASKS, "points": POINTS, "lr": LR, "meta_lr": META_LR, "width": [40, 40]}
    document = {"machine": describe_machine(), "settings": settings, "test_tasks": TEST_TASKS, "runs": rows}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
