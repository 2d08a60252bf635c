"""``metafast eval``: how well a trained learner does on tasks never seen in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import checkpoint as checkpoints
from metafast.cli.common import DataRoot, Device, Threads, changed, check_count, draw_test, test, use_device
from metafast.cli.console import bad_input, say
from metafast.cli.evaluation import TASKS, recipe_to_test
from metafast.cli.recipe import Tasks
from metafast.learners import ProtoNets


def evaluate(
    where: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint file.")],
    tasks: Annotated[int, typer.Option(help="Tasks to test on.")] = TASKS,
    ways: Annotated[int | None, typer.Option(help="Classes a task; only ProtoNets takes other ways.")] = None,
    shots: Annotated[int | None, typer.Option(help="Support samples a class, or points a wave.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query samples a class (15), or points a wave (100).")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner steps; as in training by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the tasks; that of the training by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write result.json and a picture to.")] = None,
    data_root: DataRoot = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Test a trained learner on unseen tasks: mean and 95 % interval.

    Few-shot tasks are of the test split, whose classes, scripts and alphabets were never trained on; waves are
    drawn anew.
    """
    with bad_input():
        where_to = use_device(device, threads)
        check_count("--tasks", tasks)
        checkpoint = checkpoints.load(where)
        if ways not in (None, checkpoint.recipe.ways) and checkpoint.recipe.learner != "protonets":
            raise ValueError(
                f"--ways: {str(where)!r} has a net with {checkpoint.recipe.ways} outputs, so other ways need a "
                f"training of their own; got {ways}"
            )
        recipe = changed(checkpoint.recipe, ways=ways, shots=shots, steps=steps, seed=seed)
        recipe = changed(recipe_to_test(recipe), queries=queries)
        unseen = Tasks(recipe, test=True, root=data_root, device=where_to)
        learner = checkpoints.restore(where, checkpoint, steps=recipe.steps).to(where_to)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    how = "" if isinstance(learner, ProtoNets) else f", {recipe.steps} inner steps"
    say(f"{checkpoint.recipe.title} after {checkpoint.iteration} meta-steps{how}")
    result = test(learner, unseen, tasks)
    if out is not None:
        result.write(out / "result.json")
        say(f"wrote {out / 'result.json'} and {out / draw_test(out, learner, unseen, result)}")
