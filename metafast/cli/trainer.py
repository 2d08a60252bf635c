"""Meta-training, a step at a time, in a state that a checkpoint holds completely."""

from __future__ import annotations

import math
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from metafast.cli.checkpoint import Checkpoint, Schedule, restore, restore_optimizer
from metafast.cli.metrics import Line
from metafast.cli.processes import Processes
from metafast.cli.recipe import AnyLearner, Recipe, Tasks, build_learner, build_optimizer
from metafast.episodes import Episodes


class Diverged(RuntimeError):
    """The loss or a weight became NaN or infinite."""


class Trainer:
    """A learner, its optimiser and its tasks.

    Args:
        recipe: what is trained on what.
        tasks: the training tasks, made on the device to train on.
        device: that device.
        processes: those that share the work, this one alone when None; all make the same trainer.

    Raises:
        ValueError: more processes than tasks of a meta-batch.
    """

    def __init__(self, recipe: Recipe, tasks: Tasks, device: torch.device, processes: Processes | None = None) -> None:
        self._start(recipe, tasks, device, build_learner(recipe), processes)

    @classmethod
    def resumed(
        cls,
        path: Path,
        checkpoint: Checkpoint,
        tasks: Tasks,
        device: torch.device,
        processes: Processes | None = None,
    ) -> Trainer:
        """The trainer that a checkpoint, read from ``path``, left off.

        Raises:
            ValueError: it does not hold together, or was made on another kind of device.
        """
        if checkpoint.device != device.type:
            raise ValueError(
                f"--device: {str(path)!r} was made on {checkpoint.device}, whose random numbers {device.type} "
                "cannot go on with"
            )
        trainer = cls.__new__(cls)
        trainer._start(checkpoint.recipe, tasks, device, restore(path, checkpoint), processes)
        restore_optimizer(path, checkpoint, trainer.optimizer)
        try:
            trainer._generator.set_state(checkpoint.generator)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{str(path)!r}: generator: {error}") from error
        trainer.iteration, trainer._seconds = checkpoint.iteration, checkpoint.seconds
        trainer._count = int(checkpoint.window["count"])
        trainer._loss.fill_(checkpoint.window["loss"])
        trainer._accuracy.fill_(checkpoint.window["accuracy"])
        return trainer

    def _start(
        self, recipe: Recipe, tasks: Tasks, device: torch.device, learner: AnyLearner, processes: Processes | None
    ) -> None:
        self._processes = Processes() if processes is None else processes
        self._share = self._processes.share(recipe.tasks)
        self.recipe, self.device, self.learner = recipe, device, learner.to(device)
        self.optimizer = build_optimizer(recipe, self.learner)
        self._tasks, self._generator = tasks, tasks.generator()
        self.iteration, self._seconds, self._began = 0, 0.0, time.perf_counter()
        self._count = 0
        # Summed up where they are made: reading every one would make a GPU wait for the host.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._accuracy = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def seconds(self) -> float:
        """Time since training began, without the breaks between runs."""
        return self._seconds + time.perf_counter() - self._began

    def step(self) -> None:
        """One meta-step: sample tasks, accumulate the meta-gradient, let Adam take a step."""
        episodes = self._tasks.sample(self.recipe.tasks, self._generator)
        self.optimizer.zero_grad()
        loss, accuracy = self._accumulate(episodes)
        self.optimizer.step()
        self._loss += loss
        if accuracy is not None:
            self._accuracy += accuracy
        self._count += 1
        self.iteration += 1

    def _accumulate(self, episodes: Episodes) -> tuple[Tensor, Tensor | None]:
        """Mean loss and accuracy of the tasks; their mean gradient goes to ``.grad``."""
        if self._processes.world == 1:
            outcome = self.learner.accumulate_grad(episodes)
            return outcome.loss, None if outcome.accuracy is None else outcome.accuracy.mean()
        mine = episodes[self._share]
        weights = mine.support_x.new_full((mine.tasks,), 1 / episodes.tasks)
        outcome = self.learner.accumulate_grad(mine, weights)
        summed = [outcome.loss, *([] if outcome.accuracy is None else [(weights * outcome.accuracy).sum()])]
        self._processes.add_up([*summed, *(p.grad for p in self.learner.parameters() if p.grad is not None)])
        return summed[0], summed[1] if len(summed) > 1 else None

    def fingerprint(self) -> int:
        """A number that differs between processes with other options, weights, checkpoints or data."""
        task = self._tasks.sample(1, self._tasks.generator())
        tensors = [*self.learner.state_dict().values(), task.support_x, task.query_x, self._generator.get_state()]
        code = zlib.crc32(repr((self.recipe, self.iteration)).encode())
        for tensor in tensors:
            code = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), code)
        return code

    def means(self) -> Line:
        """Loss, and accuracy for classification, over the steps since the last :meth:`line`."""
        means = {"loss": float(self._loss) / max(self._count, 1)}
        if not self.recipe.regression:
            means["accuracy"] = float(self._accuracy) / max(self._count, 1)
        return means

    def line(self) -> Line:
        """A line for the metrics file, over the steps since the last one.

        Raises:
            Diverged: the loss was NaN or infinite.
        """
        line = {"iteration": self.iteration} | self.means() | {"seconds": round(self.seconds, 3)}
        if not math.isfinite(line["loss"]):
            raise self._diverged("the loss")
        self._count = 0
        self._loss.zero_()
        self._accuracy.zero_()
        return line

    def checkpoint(self, schedule: Schedule) -> Checkpoint:
        """Everything it takes to go on from here.

        Raises:
            Diverged: there is nothing to go on from.
        """
        for name, value in self.learner.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._diverged(name)
        return Checkpoint(
            self.recipe,
            schedule,
            self.iteration,
            self.seconds,
            self.device.type,
            self._generator.get_state(),
            self.learner.state_dict(),
            self.optimizer.state_dict(),
            {"count": float(self._count), "loss": float(self._loss), "accuracy": float(self._accuracy)},
        )

    def _diverged(self, what: str) -> Diverged:
        # A schedule of smaller steps is the cure; both rates are named since either may be at fault.
        rates = "--meta-lr" if self.recipe.lr is None else "--lr or --meta-lr"
        return Diverged(f"iteration {self.iteration}: {what} is NaN or infinite; try a smaller {rates}")
