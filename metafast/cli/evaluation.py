"""How well a learner does on unseen tasks: means over tasks with 95 % intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.cli.recipe import AnyLearner, Recipe, Tasks
from metafast.data import Sinusoid
from metafast.learners import ProtoNets

TASKS = 600
# Tasks at a time: as many as keep the activations of the adapted nets within some hundred MB.
_BATCH = {"sinusoid": 100, "glyphs": 20, "omniglot": 20, "miniimagenet": 4}
_WAVE_QUERIES = 100
_CLASS_QUERIES = 15
_ITEMS_A_CLASS = {"glyphs": 24, "omniglot": 20, "miniimagenet": 600}


@dataclass(frozen=True)
class Estimate:
    """A mean over n tasks with the half-width of its 95 % interval, 1.96 std / sqrt(n)."""

    mean: float
    interval: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of a number for each task, (n,) with n of at least 2; std is that of a sample, over n - 1."""
        values = values.double()
        return cls(float(values.mean()), 1.96 * float(values.std()) / math.sqrt(values.numel()))

    def percent(self) -> str:
        """As in "93.12 ± 0.41 %"."""
        return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f} %"

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.interval:.4f}"


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        recipe: that of the tested tasks.
        tasks: how many there were.
        losses: query loss by the number of inner steps: for regression from 0 to all of them, else after all (0 for
            ProtoNets).
        accuracy: share of queries classified rightly, after all steps; None for regression.
    """

    recipe: Recipe
    tasks: int
    losses: dict[int, Estimate]
    accuracy: Estimate | None

    def lines(self) -> list[str]:
        """In words: always with the number of tasks."""
        over = f"95 % interval over {self.tasks} tasks"
        if self.accuracy is not None:
            unseen = {"glyphs": "of scripts ", "omniglot": "of alphabets "}.get(self.recipe.data, "")
            return [
                f"test accuracy {self.accuracy.percent()} ({over}: {self.recipe.task}, "
                f"{self.recipe.queries} queries a class, classes {unseen}never trained on)"
            ]
        rows = [f"{_steps(k):>13}   mse {loss}" for k, loss in self.losses.items()]
        return [f"{self.recipe.task}, unseen waves ({over}):", *rows]

    def write(self, path: Path) -> None:
        """As JSON."""
        plain: dict[str, Any] = {"tasks": self.tasks, "recipe": self.recipe.plain()}
        if self.accuracy is not None:
            plain["accuracy"] = asdict(self.accuracy)
        plain["losses"] = [{"steps": k} | asdict(loss) for k, loss in self.losses.items()]
        path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _steps(count: int) -> str:
    return "before" if count == 0 else f"after {count} step{'s' if count > 1 else ''}"


def recipe_to_test(recipe: Recipe) -> Recipe:
    """The recipe of the tasks to test on: as trained, with as many queries as tests usually have."""
    if recipe.regression:
        return replace(recipe, queries=_WAVE_QUERIES)
    left = _ITEMS_A_CLASS[recipe.data] - recipe.shots
    return replace(recipe, queries=max(1, min(_CLASS_QUERIES, left)))


def evaluate(learner: AnyLearner, tasks: Tasks, count: int, report: Callable[[int, Callable[[], str]], None]) -> Result:
    """Test a learner on ``count`` tasks, 2 or more.

    Args:
        learner: its own number of inner steps is taken.
        tasks: the source of tasks; always from the start of its stream, so the same tasks for every learner.
        count: how many.
        report: called after every batch with its size and a function that says how things stand.
    """
    recipe, generator = tasks.recipe, tasks.generator()
    steps = 0 if isinstance(learner, ProtoNets) else learner.steps
    reported = range(steps + 1) if isinstance(tasks.data, Sinusoid) else range(steps, steps + 1)
    losses: dict[int, list[Tensor]] = {k: [] for k in reported}
    accuracies: list[Tensor] = []
    done = 0
    while done < count:
        size = min(_BATCH[recipe.data], count - done)
        episodes = tasks.sample(size, generator)
        with torch.no_grad():
            for k in list(losses)[:-1]:
                assert not isinstance(learner, ProtoNets)  # which has no steps, hence none before the last
                fitted = learner.adapt(episodes.support_x, episodes.support_y, k)(episodes.query_x)
                losses[k].append((fitted - episodes.query_y).square().flatten(1).mean(1))
            outcome = learner(episodes)
        losses[steps].append(outcome.losses)
        if outcome.accuracy is not None:
            accuracies.append(outcome.accuracy)
        done += size
        report(size, lambda: f"accuracy {torch.cat(accuracies).mean():.3f}" if accuracies else "")
    estimates = {k: Estimate.of(torch.cat(values)) for k, values in losses.items()}
    return Result(recipe, count, estimates, Estimate.of(torch.cat(accuracies)) if accuracies else None)
