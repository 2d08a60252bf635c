"""``metafast train``: train a learner, test it on unseen tasks, leave checkpoint, metrics and pictures."""

from __future__ import annotations

import shlex
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from metafast.cli import checkpoint as checkpoints
from metafast.cli import metrics, plots
from metafast.cli.checkpoint import Checkpoint, Schedule
from metafast.cli.common import DataRoot, Device, Threads, check_count, draw_test, test, use_device
from metafast.cli.console import INTERRUPTED, ProgressLine, say, say_error
from metafast.cli.defaults import Data, Learner, defaults
from metafast.cli.evaluation import TASKS, recipe_to_test
from metafast.cli.interrupt import Interrupt
from metafast.cli.processes import Lost, Processes, device_of, started
from metafast.cli.recipe import Recipe, Tasks, option
from metafast.cli.recipe_file import read_recipe
from metafast.cli.trainer import Diverged, Trainer

RESULT = "result.json"
CURVES = "curves.png"
_WRITTEN = (checkpoints.NAME, metrics.NAME, RESULT, CURVES, "sinusoid.png", "episode.png")


def train(
    learner: Annotated[Learner | None, typer.Argument(help="What to train.")] = None,
    data: Annotated[Data | None, typer.Option(help="What to train on.")] = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file with what is not given here; see recipes/.")
    ] = None,
    data_root: DataRoot = None,
    ways: Annotated[int | None, typer.Option(help="Classes a task.")] = None,
    train_ways: Annotated[int | None, typer.Option(help="Classes a training task (ProtoNets).")] = None,
    shots: Annotated[int | None, typer.Option(help="Support samples a class, or points a wave.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query samples a class, or points a wave, in training.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks a meta-batch.")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Inner learning rate.")] = None,
    first_order: Annotated[bool, typer.Option("--first-order", help="Drop the second-order term.")] = False,
    meta_lr: Annotated[float | None, typer.Option(help="Learning rate of Adam, the outer optimiser.")] = None,
    rule_lr: Annotated[float | None, typer.Option(help="The same for LOMAML's learned optimiser.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of Conv4, or units of a hidden layer.")] = None,
    batch_norm: Annotated[
        Literal["batch", "running"] | None, typer.Option(help="Statistics that batch norm uses.")
    ] = None,
    source: Annotated[
        Literal["auto", "full", "small", "small-swapped"] | None,
        typer.Option(help="Omniglot's sets to train and to test on."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and of the tasks.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Meta-steps.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Meta-steps a line of the metrics file.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Meta-steps between checkpoints.")] = None,
    eval_tasks: Annotated[int | None, typer.Option(help=f"Unseen tasks of the test at the end ({TASKS}).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/LEARNER-DATA by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train a learner, then test it on unseen tasks.

    What is left out is that of the recipe, or is chosen for the learner and the data. The run's folder gets
    checkpoint.pt, metrics.jsonl, result.json, curves.png and a picture of unseen tasks. Ctrl-C writes a checkpoint;
    --resume goes on from it, to the same bits as if there had been no break. Under torchrun the processes share each
    meta-batch.
    """
    given = {
        "ways": ways,
        "train_ways": train_ways,
        "shots": shots,
        "queries": queries,
        "tasks": tasks,
        "steps": steps,
        "lr": lr,
        "first_order": first_order or None,
        "meta_lr": meta_lr,
        "rule_lr": rule_lr,
        "width": width,
        "batch_norm": batch_norm,
        "source": source,
        "seed": seed,
    }
    with started() as processes:
        with processes.setting_up():
            read = {} if recipe_file is None else read_recipe(recipe_file)
            learner, data = _named("LEARNER", learner, read), _named("--data", data, read)
            tested, length = read.pop("eval_tasks", TASKS), read.pop("iterations", None)
            eval_tasks = tested if eval_tasks is None else eval_tasks
            cadence = {
                "iterations": length if iterations is None else iterations,
                "log_every": log_every,
                "checkpoint_every": checkpoint_every,
            }
            given = read | {name: value for name, value in given.items() if value is not None}
            folder = out or Path("runs", f"{learner}-{data}")
            where = use_device(device_of(device, processes), threads)
            check_count(option("eval_tasks"), eval_tasks)
            before = _look(folder, resume, overwrite, processes)
            recipe = Recipe.of(learner, data, given) if before is None else _same(folder, before, learner, data, given)
            schedule = _schedule(recipe, before, cadence)
            training = Tasks(recipe, test=False, root=data_root, device=where)
            unseen = Tasks(recipe_to_test(recipe), test=True, root=data_root, device=where)
            trainer = _trainer(folder, before, recipe, training, where, processes)
        with processes.setting_up():
            _check_same(trainer, schedule, processes)
        with processes.setting_up():
            lines = _open(folder, before) if processes.first else []
        if processes.first:
            parameters = sum(p.numel() for p in trainer.learner.parameters())
            shared = "" if processes.world == 1 else f" in {processes.world} processes"
            what = f"{recipe.title}: {parameters:,} parameters, {recipe.tasks} tasks a meta-step"
            say(f"{what}{shared}, on {where}; writes to {folder}/")
            if before is not None:
                say(f"goes on after meta-step {trainer.iteration}")
        try:
            signal = _train(trainer, schedule, folder, lines, processes)
        except (Diverged, Lost) as error:
            # All diverge alike; a process that is lost, each misses by itself.
            if processes.first or isinstance(error, Lost):
                say_error(str(error))
            raise typer.Exit(1) from error
    if signal is not None:
        if processes.first:
            command = "metafast" if processes.world == 1 else "torchrun ... -m metafast"
            say(f"stopped after meta-step {trainer.iteration} of {schedule.iterations}; to go on:")
            say(f"  {command} train {learner} --data {data} --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(128 + signal)
    if not processes.first:
        return
    say(f"trained {trainer.iteration} meta-steps in {trainer.seconds:.1f} s")
    try:
        result = test(trainer.learner, unseen, eval_tasks)
    except KeyboardInterrupt as error:
        say(f"the test was stopped; to test: metafast eval {shlex.quote(str(folder))}")
        raise typer.Exit(INTERRUPTED) from error
    result.write(folder / RESULT)
    plots.curves(folder / CURVES, recipe, lines, result)
    picture = draw_test(folder, trainer.learner, unseen, result)
    say(f"wrote {checkpoints.NAME}, {metrics.NAME}, {RESULT}, {CURVES} and {picture} to {folder}/")


def _named(argument: str, given: Any, read: dict[str, Any]) -> Any:
    """The learner or the data: what is given, else what the recipe's file says."""
    name = argument.lstrip("-").lower()
    said = read.pop(name, None)
    if given is None and said is None:
        raise ValueError(f"{argument}: expected one, or --recipe with a file that names its {name}; got none")
    return said if given is None else given


def _look(folder: Path, resume: bool, overwrite: bool, processes: Processes) -> Checkpoint | None:
    """The checkpoint to resume; None for a fresh start. Refuses to write over a run unasked."""
    if resume and overwrite:
        raise ValueError("--overwrite: expected either --resume or --overwrite, got both")
    if resume:
        return checkpoints.load(folder / checkpoints.NAME)
    if not processes.first:
        return None
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, {str(folder)!r} is a file")
    present = [name for name in _WRITTEN if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"--out: {str(folder)!r} holds {', '.join(present)} of another run; --resume goes on with it, "
            "--overwrite replaces it"
        )
    return None


def _same(folder: Path, before: Checkpoint, learner: str, data: str, given: dict[str, Any]) -> Recipe:
    """The checkpoint's recipe, which the options must not contradict."""
    stored = before.recipe.plain()
    asked = {"learner": learner, "data": data} | {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if stored[name] != value:
            argument = "LEARNER" if name == "learner" else option(name)
            raise ValueError(
                f"{argument}: the run in {str(folder / checkpoints.NAME)!r} has {stored[name]}, got {value}; "
                "a resumed run keeps its recipe"
            )
    return before.recipe


def _schedule(recipe: Recipe, before: Checkpoint | None, given: dict[str, int | None]) -> Schedule:
    """The checkpoint's schedule, or the default one, but for what is given."""
    if before is None:
        started = Schedule(defaults(recipe.learner, recipe.data)["iterations"], log_every=20, checkpoint_every=500)
    else:
        started = before.schedule
    schedule = replace(started, **{name: value for name, value in given.items() if value is not None})
    if before is not None and schedule.iterations < before.iteration:
        raise ValueError(
            f"--iterations: the run has done {before.iteration} already, expected at least as many, "
            f"got {schedule.iterations}"
        )
    return schedule


def _trainer(
    folder: Path,
    before: Checkpoint | None,
    recipe: Recipe,
    tasks: Tasks,
    device: torch.device,
    processes: Processes,
) -> Trainer:
    if before is None:
        return Trainer(recipe, tasks, device, processes)
    return Trainer.resumed(folder / checkpoints.NAME, before, tasks, device, processes)


def _check_same(trainer: Trainer, schedule: Schedule, processes: Processes) -> None:
    """Refuse processes that would each train something else."""
    if processes.world == 1:
        return
    codes = processes.gather(zlib.crc32(repr(schedule).encode(), trainer.fingerprint()))
    if codes[processes.rank] != codes[0]:
        raise ValueError(
            "starts otherwise than process 0: expected the same options, data, versions and, with --resume, checkpoint"
        )


def _open(folder: Path, before: Checkpoint | None) -> list[metrics.Line]:
    """The metrics so far. The folder is touched last: what fails before has changed nothing."""
    if before is None:
        lines = []
        folder.mkdir(parents=True, exist_ok=True)
        stale = set(_WRITTEN)
    else:
        # What was written after the checkpoint comes again.
        lines = metrics.read(folder / metrics.NAME, until=before.iteration)
        stale = set(_WRITTEN) - {checkpoints.NAME, metrics.NAME}
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in (checkpoints.NAME, metrics.NAME):
        checkpoints.clear_unfinished(folder / name)
    metrics.write(folder / metrics.NAME, lines)
    return lines


def _train(
    trainer: Trainer, schedule: Schedule, folder: Path, lines: list[metrics.Line], processes: Processes
) -> int | None:
    """Train to the end of the schedule, or to a signal, whose number is returned; the last state is saved."""
    bar = ProgressLine("training", schedule.iterations, trainer.iteration, silent=not processes.first)
    status = ""

    def log() -> None:
        nonlocal status
        line = trainer.line()
        if processes.first:
            lines.append(line)
            metrics.append(folder / metrics.NAME, line)
        status = f"loss {line['loss']:.4f}" + (f"  accuracy {line['accuracy']:.3f}" if "accuracy" in line else "")

    def save() -> None:
        checkpoint = trainer.checkpoint(schedule)
        if processes.first:
            checkpoints.save(folder / checkpoints.NAME, checkpoint)

    with Interrupt() as interrupt, bar:
        signal = processes.heard(interrupt.signal)
        while trainer.iteration < schedule.iterations and signal is None:
            trainer.step()
            if trainer.iteration % schedule.log_every == 0 or trainer.iteration == schedule.iterations:
                log()
            if trainer.iteration % schedule.checkpoint_every == 0:
                save()
            bar.advance(1, lambda: status)
            signal = processes.heard(interrupt.signal)
        save()
    return processes.heard(interrupt.signal) if signal is None else signal
