"""The memory that a side's meta-step takes at most, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from metafast.bench.sides import Side
from metafast.bench.workloads import Workload, build

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def can_measure() -> bool:
    """Whether the system tells the peak of a process's memory, and forgets it when asked: Linux."""
    return os.access(_CLEAR, os.W_OK) and _STATUS.exists()


def peak_bytes(workload: Workload, side: Side, threads: int) -> int:
    """What the process holds at most during a meta-step, above what it held before the side was made.

    A side first does a smaller problem, so that code loaded and compiled for the first time does not count; then one
    meta-step untold, for what it compiles for this shape and what it keeps between steps, which does count; then the
    one that is told of. Resident memory of a new Python process on Linux, pages of 4 KiB.

    Args:
        workload: what to do.
        side: who, one of the suites' sides.
        threads: torch's.

    Raises:
        RuntimeError: the side failed, or the system does not tell.
    """
    command = [sys.executable, "-m", "metafast.bench.memory", json.dumps(asdict(workload)), side.name, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def peak_of_step(workload: Workload, side: Side) -> int:
    """:func:`peak_bytes` of this very process, which must have done nothing of the kind before."""
    if not can_measure():
        raise RuntimeError(f"memory: expected Linux with a writable {_CLEAR}, got {sys.platform}")
    side.prepare(build(workload.shrunk())).step()
    problem = build(workload)
    before = _resident("VmRSS")
    prepared = side.prepare(problem)
    prepared.step()
    _free()
    _CLEAR.write_text("5")  # the peak starts again from what is there now
    prepared.step()
    return max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    _free()
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _free() -> None:
    """What is freed but kept by the C library's allocator goes back to the system, and does not count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(workload: str, side: str, threads: str) -> None:
    """Print the peak, for :func:`peak_bytes`."""
    from metafast.bench.suites import SUITES  # which needs this module

    torch.set_num_threads(int(threads))
    sides = {found.name: found for suite in SUITES.values() for found in suite.sides}
    fields = json.loads(workload)
    fields["image"] = tuple(fields["image"])
    print(peak_of_step(Workload(**fields), sides[side]))


if __name__ == "__main__":
    main(*sys.argv[1:])
