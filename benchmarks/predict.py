"""What a paper-and-pencil model says a GPU needs for the workloads, in Markdown, for benchmarks/gpu.md.

The counts are metafast/bench/cost.py's; the numbers of the GPU are its data sheet's, for an H100 SXM unless others are
given. No GPU has been asked.

    python benchmarks/predict.py [--bandwidth 3.35e12] [--flops 67e12] [--launch 2.5e-6]
"""

from __future__ import annotations

import argparse

from torch import nn

from metafast.bench.cost import cost_of, seconds
from metafast.bench.workloads import WORKLOADS, Workload, build
from metafast.engine.lowering import lower

BANDWIDTH, FLOPS, LAUNCH = 3.35e12, 67e12, 2.5e-6
# The fused kernel: an H100's multiprocessors, their clock, and the words of shared memory that each loads in a cycle.
MULTIPROCESSORS, CLOCK, WORDS = 132, 1.98e9, 32
# In its loops a multiply-add loads both factors from shared memory.
LOADS = 2
# A barrier of 256 threads with the latencies that it uncovers (first loads, a reduction's last steps), in cycles.
BARRIER = 200

SHOWN = ("sinusoid-k1", "sinusoid-k5", "conv4-64-k1", "conv4-64-k5", "lomaml-sinusoid", "protonets-conv4-64")
FUSED = ("sinusoid-k1", "sinusoid-k5", "odd-mlp")


def barriers(workload: Workload) -> int:
    """Of a task in csrc/cuda/mlp_meta_step.cuh: three a layer in each of 2 K + 1 sweeps, one a step, and the first."""
    layers = sum(isinstance(m, nn.Linear) for m in build(workload.shrunk()).model.modules())
    return (2 * workload.steps + 1) * 3 * layers + workload.steps + 1


def fused_launches(workload: Workload) -> int:
    """Theta into the engine's order, the kernel, classes' accuracy, the sum over tasks, two into the user's order."""
    return 6 if workload.loss == "cross_entropy" else 5


def fused_flops(workload: Workload) -> int:
    """Of a task in that kernel, which keeps no step: gradients, and with a Hessian's tangents all but the weights' own.

    With F flops in a sample's forward and F1 in the first layer's, 3 F - F1 and 8 F - 5 F1; and the updates.
    """
    problem = build(workload.shrunk())
    network = lower(problem.model, tuple(problem.episodes.support_x.shape[2:]), "batch")
    forward, first = network.flops, network.layers[0].flops
    support, query = (max(1, workload.ways) * n for n in (workload.shots, workload.queries))
    gradients = (workload.steps * support + query) * (3 * forward - first)
    return gradients + workload.steps * (support * (8 * forward - 5 * first) + 4 * network.adapting)


def fused_seconds(workload: Workload) -> float:
    """The kernel of small MLPs: a multiprocessor has a task, and loads from shared memory are what it waits for.

    The launches, and what it takes on a multiprocessor: the loads of the task's multiply-adds and its barriers. With
    more tasks than multiprocessors, so many times.
    """
    waves = -(-workload.tasks // MULTIPROCESSORS)
    multiply_adds = fused_flops(workload) / 2
    cycles = multiply_adds * LOADS / WORDS + barriers(workload) * BARRIER
    return fused_launches(workload) * LAUNCH + waves * cycles / CLOCK


def plain(number: float) -> str:
    """Three digits, no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def general_table(bandwidth: float = BANDWIDTH, flops: float = FLOPS, launch: float = LAUNCH) -> str:
    """A row a workload: what is counted, each bound on its own in microseconds, and the prediction, call by call."""
    lines = [
        "| workload | GFLOP | MB | launches | by flops | by bytes | by launches | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SHOWN:
        cost = cost_of(WORKLOADS[name])
        bounds = (cost.flops / flops, cost.bytes / bandwidth, cost.launches * launch)
        times = (*bounds, seconds(cost, flops, bandwidth, launch))
        cells = (
            name,
            *(plain(n) for n in (cost.flops / 1e9, cost.bytes / 1e6, cost.launches)),
            *(f"{plain(1e6 * t)} us" for t in times),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fused_table() -> str:
    """The fused kernel beside the general way."""
    lines = ["| workload | fused, predicted | general way, predicted | ratio |", "|---|---|---|---|"]
    for name in FUSED:
        one = fused_seconds(WORKLOADS[name])
        other = seconds(cost_of(WORKLOADS[name]), FLOPS, BANDWIDTH, LAUNCH)
        lines.append(f"| {name} | {plain(1e6 * one)} us | {plain(1e6 * other)} us | {other / one:.1f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for option, default in (("--bandwidth", BANDWIDTH), ("--flops", FLOPS), ("--launch", LAUNCH)):
        parser.add_argument(option, type=float, default=default)
    given = parser.parse_args()
    print(general_table(given.bandwidth, given.flops, given.launch))
    print()
    print(fused_table())
