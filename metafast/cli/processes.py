"""One training by several processes, as torchrun starts them: each takes its share of every meta-batch.

All W processes draw the same T tasks; process r adapts to those from r T // W to (r + 1) T // W, and one all-reduce
adds

    meta-gradient = sum_r sum_{t of r} grad_t / T

which is the one process's mean whether W divides T or not. All take the same step, so all have the same weights; the
first one alone writes and prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from metafast.cli.console import BAD_INPUT, bad_input, say_error
from metafast.cli.recipe import option

# Longer than any process may be busy alone: reading a data set, writing a checkpoint.
TIMEOUT = timedelta(minutes=10)


class Lost(RuntimeError):
    """Another process of the training failed, or was silent for too long."""


class Processes:
    """The processes of a training, or this one alone.

    Args:
        rank: number of this process.
        world: W, how many there are.

    Example:
        >>> Processes(rank=1, world=2).share(5)
        slice(2, 5, None)
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, tasks: int) -> slice:
        """This process's tasks of a meta-batch.

        Raises:
            ValueError: a process would have none.
        """
        if tasks < self.world:
            raise ValueError(f"{option('tasks')}: expected at least {self.world}, one a process, got {tasks}")
        return slice(self.rank * tasks // self.world, (self.rank + 1) * tasks // self.world)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over the processes, the same bits in each.

        Raises:
            Lost: another process is gone.
        """
        if self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with self._together():
            dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(summed.view_as(tensor))

    def gather(self, number: int) -> list[int]:
        """What each process gives, in the order of ranks.

        Raises:
            Lost: another process is gone.
        """
        if self.world == 1:
            return [number]
        numbers = torch.zeros(self.world, dtype=torch.int64)
        numbers[self.rank] = number
        with self._together():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def heard(self, signal: int | None) -> int | None:
        """The signal that any of them got; all are told the same at the same time."""
        return next((number for number in self.gather(signal or 0) if number), None)

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """:func:`~metafast.cli.console.bad_input` for all: where one has an error, it says so and none goes on."""
        error: Exception | None = None
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError) as raised:
            error = raised
        failed = self.gather(int(error is not None))
        if not any(failed):
            return
        if failed.index(1) == self.rank:
            say_error(str(error) if self.first else f"process {self.rank}: {error}")
        raise typer.Exit(BAD_INPUT) from error

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise Lost(
                f"process {self.rank} of {self.world}: another one failed, or was silent for too long: {reason}"
            ) from error


@contextmanager
def started() -> Iterator[Processes]:
    """The processes that torchrun started, by its variables; a group that is there is taken; else this one alone."""
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    with bad_input():
        # Numbers of the host go by gloo; gradients by what their device has.
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def device_of(name: str, processes: Processes) -> str:
    """The device's name for this process: each has its own GPU, that of LOCAL_RANK.

    Raises:
        ValueError: one GPU for all of them.
    """
    if processes.world == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ValueError(f"--device: expected cuda, where each process takes a GPU of its own, got {name!r}")
    return f"cuda:{os.environ.get('LOCAL_RANK', processes.rank)}"
