"""Two processes with a gloo group, for tests: plain functions of a test module run in both."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEADLINE = 300.0


def _start(work: Callable[..., Any], rank: int, folder: Path, seconds: float, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'group'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=seconds),
    )
    torch.save(work(rank, *arguments), folder / f"result{rank}")
    dist.destroy_process_group()
    # Not by the interpreter's end, in which gloo's threads may still want it: see metafast/__main__.py.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_two(
    work: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 120, codes: tuple[int, int] = (0, 0)
) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each process; waits ``seconds`` for the other, ends as ``codes``."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_start, args=(work, rank, folder, seconds, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert tuple(process.exitcode for process in processes) == codes
    finally:
        for process in processes:
            process.kill()
            process.join()
    results = [folder / f"result{rank}" for rank in range(2)]
    return [torch.load(result, weights_only=True) if result.exists() else None for result in results]
