"""Check every side's meta-gradient, then time all of them, alternating."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metafast import _check
from metafast.backend import Refusal, current_backend, use_backend
from metafast.bench import peers, sides
from metafast.bench.cost import cost_of
from metafast.bench.machine import describe_machine
from metafast.bench.memory import can_measure, peak_bytes
from metafast.bench.sides import Prepared, Side
from metafast.bench.timing import Timing, alternate, stopwatch
from metafast.bench.workloads import WORKLOADS, Problem, Workload, build
from metafast.checks.compare import full_float32, relative_error
from metafast.checks.suite import kernels_of

# In float64 whatever is the same mathematics agrees far better than this.
EXACT = 1e-10
# In float32 a ReLU or max-pool decision near 0 may fall the other way, in plain PyTorch too, and five inner steps
# amplify it: on Conv4-64 with K=5 the reference loop's error was 2e-4 for most seeds, and up to 0.15.
FLOAT32_BAR = 0.3

Document = dict[str, Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Suite:
    """Who runs what: workloads by name, and sides."""

    name: str
    workloads: tuple[str, ...]
    sides: tuple[Side, ...]


_SMALL = ("sinusoid-k1", "sinusoid-k5", "conv4-64-small", "lomaml-sinusoid", "protonets-small")
_FULL = tuple(name for name in WORKLOADS if not name.endswith("-small"))
_DOORS = (sides.AUTOGRAD, sides.ACCUMULATE, sides.REFERENCE, sides.GRAPH)
_LOOPS = (peers.LEARN2LEARN, peers.EASYFSL, peers.HIGHER, peers.TORCHOPT)
_BATCHED = (peers.TORCHOPT_VMAP, peers.FUNC_USUAL, peers.FUNC)

_ALL = (
    # Under a minute: small workloads, and the peers that need no compilation.
    Suite("reference", _SMALL, (*_DOORS, *_LOOPS, *_BATCHED)),
    # Full sizes, metafast's backends.
    Suite("engine", _FULL, (*_DOORS, sides.TORCH_BACKEND)),
    # Full sizes, everybody.
    Suite("peers", _FULL, (*_DOORS, *_LOOPS, *_BATCHED, peers.COMPILE, peers.JAX)),
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


def run(
    suite: Suite,
    workloads: Sequence[Workload],
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
    finished: Callable[[Document], None] = lambda result: None,
    device: torch.device = CPU,
    memory: bool = False,
) -> Document:
    """Check and time workloads.

    Args:
        suite: whose sides take part.
        workloads: what to run.
        seconds: of timing for each workload.
        progress: told what is going on.
        finished: told the result of each workload.
        device: where it is computed; on a GPU times are between CUDA's events, and float32 is without TF32.
        memory: measure the peak of memory too, each side in a process of its own; on the CPU.

    Returns:
        Everything found, as plain JSON values: ``machine``, ``settings`` and a list ``workloads``, in which every
        side has its status, errors and times. :func:`metafast.bench.report.summary` and ``plot`` read it.

    Raises:
        TypeError, ValueError: seconds is no number of at least 0; memory is for the CPU.
        RuntimeError: the system does not tell the memory of a process.
        Exception: whatever metafast itself raises; what a peer raises is its status.
    """
    _check.number("seconds", seconds, minimum=0.0)
    if memory and device.type != "cpu":
        raise ValueError(f"memory: expected the device cpu, got {device}")
    if memory and not can_measure():
        raise RuntimeError("memory: expected Linux, whose /proc tells the peak of a process's memory")
    where = describe_machine(device)
    results = []
    with full_float32():
        for workload in workloads:
            results.append(_workload(suite, workload, seconds, progress, device, memory))
            finished(results[-1])
    settings = {
        "suite": suite.name,
        "seconds": seconds,
        "backend": current_backend(),
        "device": str(device),
        "timer": stopwatch(device)[0],
        "exact_float64": EXACT,
        "float32_bar": FLOAT32_BAR,
    }
    return {"format": 1, "machine": where, "settings": settings, "workloads": results}


def _workload(
    suite: Suite,
    workload: Workload,
    seconds: float,
    progress: Callable[[str], None],
    device: torch.device,
    memory: bool,
) -> Document:
    progress(f"{workload.name}: float64 reference")
    problem = build(workload)
    wanted = reference_gradient(problem)
    small = build(workload.shrunk())
    wanted_small = reference_gradient(small)
    results: dict[str, Document] = {}
    ready: dict[str, Prepared] = {}
    for side in suite.sides:
        if device.type not in side.devices:
            continue
        result: Document = {"side": side.name, "ours": side.ours, "version": side.version}
        results[side.name] = result
        if obstacle := side.obstacle(workload):
            result["status"] = obstacle
            continue
        progress(f"{workload.name}: checking {side.name}")
        try:
            exactness = gradient_error(side.prepare(small.copy(torch.float64, device)), wanted_small)
            if workload.net in side.untimed:
                same = exactness is not None and exactness <= EXACT
                result |= {"error_float64": exactness, "status": "exact, not timed" if same else "differs, not timed"}
                continue
            prepared = side.prepare(problem.copy(device=device))
            error = gradient_error(prepared, wanted)
        except Exception as failure:
            # A GPU that only some people have is no place to lose all other figures; problems() names it.
            if side.ours and device.type == "cpu":
                raise
            result |= {"status": "failed", "reason": f"{type(failure).__name__}: {failure}".strip().splitlines()[0]}
            continue
        result |= {"error_float64": exactness, "error_float32": error, "status": _verdict(exactness, error)}
        if side.ours:
            result["by"] = computed_by(side, small.copy(torch.float64, device), device)
        ready[side.name] = prepared
        if memory:
            progress(f"{workload.name}: memory of {side.name}")
            result["peak_bytes"] = peak_bytes(workload, side, torch.get_num_threads())
    progress(f"{workload.name}: timing {len(ready)} sides")
    measure = stopwatch(device)[1]
    timings = alternate({name: prepared.step for name, prepared in ready.items()}, seconds, measure=measure)
    for name, timing in timings.items():
        results[name] |= _numbers(timing)
    return {"workload": asdict(workload), "cost": cost_of(workload).json(), "sides": list(results.values())}


def computed_by(side: Side, problem: Problem, device: torch.device) -> str:
    """What computes metafast's own side: the device's kernels, or torch and why; a problem of its own, to try it on."""
    kernels = kernels_of(device, current_backend())
    if side.by_torch or not kernels:
        return "torch"
    try:
        with use_backend(kernels):
            side.prepare(problem).step()
    except Refusal as refusal:
        return f"torch: {refusal}"
    return kernels


def _verdict(exactness: float | None, error: float | None) -> str:
    """ "exact": the same mathematics, and float32 as near as float32 gets; "off": that, but not so near."""
    if exactness is None or error is None or exactness > EXACT:
        return "differs"
    return "exact" if error <= FLOAT32_BAR else "off"


def reference_gradient(problem: Problem) -> Tensor:
    """The float64 meta-gradient by the plain loop."""
    prepared = sides.REFERENCE.prepare(problem.copy(torch.float64))
    prepared.step()
    return prepared.gradient()


def gradient_error(prepared: Prepared, wanted: Tensor) -> float | None:
    """Relative error of the flattened meta-gradient; None where it is not finite."""
    prepared.step()
    error = relative_error(prepared.gradient(), wanted)
    return error if math.isfinite(error) else None


def _numbers(timing: Timing) -> Document:
    return {
        "median_seconds": timing.median,
        "quartile_seconds": list(timing.quartiles),
        "round_seconds": list(timing.rounds),
        "calls_a_round": timing.calls,
    }
