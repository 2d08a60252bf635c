"""What `train` and `eval` have in common: the device, the options, and the results of a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from metafast import _check
from metafast.cli import plots
from metafast.cli.console import ProgressLine, say
from metafast.cli.evaluation import Result, evaluate
from metafast.cli.recipe import AnyLearner, Recipe, Tasks
from metafast.learners import GradientLearner

DataRoot = Annotated[
    Path | None,
    typer.Option(envvar="METAFAST_DATA", help="Folder with Omniglot's zip files or miniImageNet's pictures."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; PyTorch's own choice by default.")]


def use_device(name: str, threads: int | None) -> torch.device:
    """The device of a name; sets the number of threads.

    Raises:
        ValueError: no such device here, or threads below one.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name!r} is not there; this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if threads is not None:
        torch.set_num_threads(_check.integer("--threads", threads, minimum=1))
    return device


def check_count(option: str, count: int) -> None:
    """Refuse fewer tasks than an interval can be made of."""
    _check.integer(option, count, minimum=2)


def test(learner: AnyLearner, tasks: Tasks, count: int) -> Result:
    """Evaluate with a progress bar, and print what was found."""
    with ProgressLine("testing", count, unit="tasks", lines=False) as progress:
        result = evaluate(learner, tasks, count, progress.advance)
    for line in result.lines():
        say(line, style="bold")
    return result


def draw_test(folder: Path, learner: AnyLearner, tasks: Tasks, result: Result) -> str:
    """Draw the picture of unseen tasks into a folder, and return its name."""
    if isinstance(learner, GradientLearner) and tasks.recipe.regression:
        plots.sinusoid(folder / "sinusoid.png", learner, tasks, result)
        return "sinusoid.png"
    plots.episode(folder / "episode.png", learner, tasks)
    return "episode.png"


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with what is not None changed."""
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})
