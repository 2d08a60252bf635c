"""The pictures of a run: learning curves, waves before and after adaptation, an episode with its predictions.

Drawn on figure objects of their own, so that nothing of pyplot's global state is touched.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from metafast.cli.evaluation import Result
from metafast.cli.metrics import Line
from metafast.cli.recipe import NAMES, AnyLearner, Recipe, Tasks
from metafast.data import Sinusoid
from metafast.learners import GradientLearner

# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, GREY, INK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8a8a", "#222222"
WAVES = 5
QUERIES_SHOWN = 8
ROWS_SHOWN = 10


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def curves(path: Path, recipe: Recipe, lines: list[Line], result: Result) -> None:
    """Loss, and accuracy for classification, against the meta-steps, with what the test found."""
    names = ["loss"] if recipe.regression else ["loss", "accuracy"]
    figure = _figure(5.2 * len(names) + 0.4, 3.8)
    figure.suptitle(f"{recipe.title}: training", fontsize=13)
    steps = np.array([line["iteration"] for line in lines])
    trained_on = "training tasks" if recipe.train_ways is None else f"{recipe.train_ways}-way training tasks"
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        values = np.array([line[name] for line in lines])
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, _smooth(values), color=BLUE, linewidth=2, label=trained_on)
        _tidy(axes, "meta-steps", "mean squared error" if recipe.regression else name)
        test = result.accuracy if name == "accuracy" else list(result.losses.values())[-1]
        if test is not None:
            axes.axhspan(test.mean - test.interval, test.mean + test.interval, color=ORANGE, alpha=0.3, linewidth=0)
            axes.axhline(test.mean, color=ORANGE, linewidth=1.5, label=f"unseen test tasks: {test.mean:.3f}")
        if name == "accuracy":
            axes.set_ylim(top=1.0)
        elif recipe.regression:
            # From the error of knowing nothing to a fiftieth of it: on a linear axis all of the end is one line.
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0.0)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, smaller at its ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    mean: np.ndarray = (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
    return mean


def sinusoid(path: Path, learner: GradientLearner, tasks: Tasks, result: Result) -> None:
    """Unseen waves before and after adaptation, and the error by the number of inner steps."""
    recipe, data, generator = tasks.recipe, tasks.data, tasks.generator()
    assert isinstance(data, Sinusoid)
    waves = data.sample_tasks(WAVES, generator)
    episodes = waves.episodes(recipe.shots, 1, generator)
    x = torch.linspace(*data.x, 201).reshape(-1, 1).to(episodes.support_x)
    truth = waves.evaluate(x)
    shown = sorted({0, min(1, learner.steps), learner.steps})
    with torch.no_grad():
        fits = {
            k: learner.adapt(episodes.support_x, episodes.support_y, k)(x.expand(WAVES, -1, 1)).cpu() for k in shown
        }
    figure = _figure(12, 6.6)
    figure.suptitle(f"{recipe.title}: unseen waves before and after adaptation", fontsize=13)
    panels = figure.subplots(2, 3).flatten()
    styles = {0: (GREY, ":"), 1: (ORANGE, "--"), learner.steps: (RED, "-")}
    limit = 1.15 * float(truth.abs().max())
    for wave, axes in enumerate(panels[:WAVES]):
        axes.plot(x[:, 0].cpu(), truth[wave, :, 0].cpu(), color=BLUE, linewidth=2.5, alpha=0.55, label="true wave")
        for k in shown:
            color, line = styles[k]
            axes.plot(x[:, 0].cpu(), fits[k][wave, :, 0], color=color, linestyle=line, linewidth=1.6, label=_after(k))
        points = episodes.support_x[wave, :, 0].cpu(), episodes.support_y[wave, :, 0].cpu()
        axes.scatter(*points, color=INK, s=22, zorder=3, label=f"{recipe.shots} support points")
        axes.set_title(f"amplitude {waves.amplitude[wave]:.1f}, phase {waves.phase[wave]:.1f}", fontsize=10)
        axes.set_ylim(-limit, limit)
        _tidy(axes, "x", "y")
    _error_by_step(panels[-1], result)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def _after(steps: int) -> str:
    return "before adaptation" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}"


def _error_by_step(axes: Axes, result: Result) -> None:
    steps = list(result.losses)
    means = [loss.mean for loss in result.losses.values()]
    bars = [loss.interval for loss in result.losses.values()]
    axes.errorbar(steps, means, yerr=bars, color=RED, marker="o", markersize=4, capsize=3, linewidth=1.6)
    axes.set_title(f"error on {result.tasks} unseen waves (95 % interval)", fontsize=10)
    axes.set_xticks(steps if len(steps) <= 12 else steps[:: len(steps) // 10])
    axes.set_ylim(bottom=0)
    _tidy(axes, "inner steps", "mean squared error")


def episode(path: Path, learner: AnyLearner, tasks: Tasks) -> None:
    """One unseen task: each class's support beside its queries, framed green where classified rightly, else red."""
    recipe, episodes = tasks.recipe, tasks.sample(1, tasks.generator())
    with torch.no_grad():
        predicted = learner(episodes).logits[0].argmax(-1).cpu()
    right = predicted == episodes.query_y[0].cpu()
    ways, shots = int(episodes.support_y.max()) + 1, recipe.shots
    rows = min(ways, ROWS_SHOWN)
    supports, queries = min(shots, 5), min(recipe.queries, QUERIES_SHOWN)
    columns = supports + queries
    figure = _figure(0.95 * columns + 1.2, 1.06 * rows + 1.3)
    figure.suptitle(
        f"{NAMES[recipe.learner]} on an unseen {recipe.task} task: {int(right.sum())} of {len(right)} queries right",
        fontsize=12,
    )
    grid = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[1] * supports + [0.25] + [1] * queries)
    for row in range(rows):
        for column in range(supports):
            _show(grid[row, column], episodes.support_x[0, row * shots + column], BLUE)
        grid[row, supports].set_axis_off()
        for column in range(queries):
            axes, index = grid[row, supports + 1 + column], row * recipe.queries + column
            _show(axes, episodes.query_x[0, index], GREEN if right[index] else RED)
            verdict = "right" if right[index] else f"said {int(predicted[index]) + 1}"
            axes.set_xlabel(verdict, fontsize=8, labelpad=2, color=GREEN if right[index] else RED)
        grid[row, 0].set_ylabel(f"class {row + 1}", fontsize=10, color=INK)
    grid[0, 0].set_title("support", fontsize=11, color=BLUE, loc="left")
    grid[0, supports + 1].set_title("queries", fontsize=11, color=INK, loc="left")
    figure.savefig(path)


def _show(axes: Axes, picture: Tensor, frame: str) -> None:
    """A picture (C, H, W), ink dark on white where it has one channel, in a coloured frame."""
    pixels = picture.movedim(0, -1).cpu().numpy()
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2.2)
