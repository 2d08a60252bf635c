"""The quadratics of Andrychowicz et al. 2016: does a trained LSTM optimiser beat the hand-made ones on its own ground?

    python benchmarks/quadratics.py            # train, compare, write results/quadratics.json, draw the picture
    python benchmarks/quadratics.py --draw     # draw the picture from the JSON file alone

f(theta) = ||W theta - y||^2 in 10 dimensions, W and y i.i.d. N(0, 1), theta_0 ~ N(0, 0.01^2) as in the paper's code;
100 steps. Such a function is a linear network with "mse" on ten samples, f = 10 mse, so LOMAML takes it as it is: steps
along the support set's gradient, judged on the same set after every step, backpropagation cut every 20 steps, gradients
as constants (first order), all as in the paper; but its psi is updated after 100 steps and not after each 20, and the
optimiser sees gradients by the paper's log/sign preprocessing, which the paper left out here.

100 unseen problems then. SGD, Nesterov's momentum 0.9, RMSProp and Adam (PyTorch's defaults otherwise) each get the
rate of a grid that is best on these very test problems, the generous way (for gradients of mse; for those of f it is
a tenth); the learned optimiser has nothing to tune and was never tried on them. Exits with 1 if one of them ends
below it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import metafast as mf
from metafast.bench.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "quadratics.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "quadratics.png"
SETTINGS: dict[str, Any] = {
    "dimensions": 10,
    "steps": 100,
    "truncate": 20,
    "start": 0.01,
    "tasks": 64,
    "iterations": 2000,
    "meta_lr": 0.003,
    "clip": 1.0,
    "lr": 0.1,
    "problems": 100,
    "seed": 0,
    "test_seed": 20161104,
    "threads": 1,
}
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
BASELINES: dict[str, Callable[[float], Make]] = {
    "SGD": lambda lr: lambda params: torch.optim.SGD(params, lr),
    "NAG": lambda lr: lambda params: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True),
    "RMSProp": lambda lr: lambda params: torch.optim.RMSprop(params, lr),
    "Adam": lambda lr: lambda params: torch.optim.Adam(params, lr),
}
GRID = [10 ** (k / 8) for k in range(-32, 9)]  # eight rates a decade, 1e-4 to 10
COLOURS = {"SGD": "#8a8a8a", "NAG": "#009e73", "RMSProp": "#e69f00", "Adam": "#d55e00", "LSTM": "#0072b2"}


def sample(problems: int, generator: torch.Generator) -> mf.Episodes:
    """Problems as tasks: W (T, D, D) and y (T, D, 1), support and query the same."""
    size = SETTINGS["dimensions"]
    w = torch.randn(problems, size, size, generator=generator)
    y = torch.randn(problems, size, 1, generator=generator)
    return mf.Episodes(w, y, w, y)


def train() -> tuple[mf.CoordinatewiseOptimizer, list[float]]:
    """The optimiser, and the mean loss over problems and steps by meta-step."""
    torch.manual_seed(SETTINGS["seed"])
    generator = torch.Generator().manual_seed(SETTINGS["seed"] + 1)
    steps, count = SETTINGS["steps"], SETTINGS["iterations"]
    net = nn.Linear(SETTINGS["dimensions"], 1, bias=False)
    learner = mf.LOMAML(
        net,
        lr=SETTINGS["lr"],
        steps=steps,
        loss="mse",
        first_order=True,
        learn_init=False,
        query_weights=[1.0] * steps,
        truncate=SETTINGS["truncate"],
    )
    psi = list(learner.optimizer.parameters())
    meta = torch.optim.Adam(psi, SETTINGS["meta_lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta, count)
    losses = []
    for iteration in range(count):
        nn.init.normal_(net.weight, std=SETTINGS["start"], generator=generator)
        meta.zero_grad()
        out = learner.accumulate_grad(sample(SETTINGS["tasks"], generator))
        nn.utils.clip_grad_norm_(psi, SETTINGS["clip"])
        meta.step()
        schedule.step()
        losses.append(out.loss.item() * SETTINGS["dimensions"] / steps)
        if (iteration + 1) % 100 == 0:
            print(f"meta-step {iteration + 1}: mean loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    return learner.optimizer, losses


def descend(make: Make, problems: mf.Episodes, start: Tensor) -> list[float]:
    """f after 0..K steps, the mean over the problems; all at once, since every optimiser here is coordinatewise."""
    theta = start.clone().requires_grad_()
    optimizer = make([theta])
    w, y = problems.support_x, problems.support_y

    def value() -> Tensor:
        return (w @ theta - y).square().sum((1, 2))

    path = []
    for _ in range(SETTINGS["steps"]):
        optimizer.zero_grad()
        values = value()
        # As in training, along the gradients of the mean over the samples.
        (values.sum() / SETTINGS["dimensions"]).backward()
        optimizer.step()
        path.append(values.mean().item())
    return [*path, value().mean().item()]


def compare(learned: mf.CoordinatewiseOptimizer) -> dict[str, dict[str, Any]]:
    """Every optimiser's curve; the baselines' each at its best rate."""
    generator = torch.Generator().manual_seed(SETTINGS["test_seed"])
    problems = sample(SETTINGS["problems"], generator)
    start = SETTINGS["start"] * torch.randn(SETTINGS["problems"], SETTINGS["dimensions"], 1, generator=generator)
    curves = {"LSTM": {"lr": SETTINGS["lr"], "curve": descend(_stepping(learned), problems, start)}}
    for name, by_rate in BASELINES.items():
        tried = [(lr, descend(by_rate(lr), problems, start)) for lr in GRID]
        finite = [one for one in tried if math.isfinite(one[1][-1])]
        lr, curve = min(finite, key=lambda one: one[1][-1])
        curves[name] = {"lr": lr, "curve": curve}
    return curves


def _stepping(learned: mf.CoordinatewiseOptimizer) -> Make:
    return lambda params: learned.as_torch(params, lr=SETTINGS["lr"])


def draw(document: dict[str, Any]) -> None:
    """The loss against the steps, from what the JSON file says."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, found in document["optimizers"].items():
        mine = name == "LSTM"
        label = "LSTM, learned" if mine else f"{name}, best rate {found['lr']:.2g}"
        axes.plot(found["curve"], color=COLOURS[name], linewidth=2.4 if mine else 1.6, label=label, zorder=2 + mine)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, mean over 100 unseen quadratics")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Software": None})


def main() -> int:
    """Train, compare, write and draw; 1 if the learned optimiser is not the best."""
    parser = argparse.ArgumentParser(description="The quadratics of Andrychowicz et al. 2016.")
    parser.add_argument("--draw", action="store_true", help="draw the picture from the JSON file and do nothing else")
    if not parser.parse_args().draw:
        torch.set_num_threads(SETTINGS["threads"])
        begun = time.perf_counter()
        learned, losses = train()
        seconds = time.perf_counter() - begun
        document = {
            "machine": describe_machine(),
            "settings": SETTINGS,
            "train_seconds": round(seconds, 1),
            "train_loss": [round(sum(losses[k : k + 100]) / 100, 5) for k in range(0, len(losses), 100)],
            "optimizers": compare(learned),
        }
        RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    document = json.loads(RESULT.read_text("utf-8"))
    draw(document)
    final = {name: found["curve"][-1] for name, found in document["optimizers"].items()}
    for name, value in sorted(final.items(), key=lambda item: item[1]):
        print(f"{name}: {value:.4f} after {document['settings']['steps']} steps")
    return int(any(value <= final["LSTM"] for name, value in final.items() if name != "LSTM"))


if __name__ == "__main__":
    sys.exit(main())
