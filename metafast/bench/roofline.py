"""How near the kernels come to what the machine can do: ceilings measured here, and each operator against them.

The ceilings: a copy between two large buffers, and matrix products large enough for the best library. An operator's
time cannot be less than its bytes at the copy's speed, nor than its flops at the product's: the larger of the two,
divided by the measured time, is its share of the roofline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast import ops
from metafast.bench.timing import alternate, stopwatch
from metafast.lstm import LSTMOptimizer

Document = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: bytes of the copied buffer, the side of the matrices, and the operators' T, P, N, D."""

    copied: int
    matrix: int
    tasks: int
    parameters: int
    samples: int
    features: int


# Far above caches and far below memory; a CPU gets sizes that it can do in a moment.
LARGE = Sizes(2**29, 8192, 32, 1_000_000, 256, 1024)
SMALL = Sizes(2**26, 1024, 8, 100_000, 64, 256)


@dataclass(frozen=True)
class Work:
    """Something to time: flops, and the bytes that it has to read and write."""

    name: str
    step: Callable[[], object]
    flops: int
    bytes: int


def measure(device: torch.device, seconds: float, sizes: Sizes | None = None) -> Document:
    """Time the ceilings and the operators.

    Args:
        device: where.
        seconds: for each.
        sizes: large on a GPU and small elsewhere, if None.

    Returns:
        ``ceilings`` by name: bytes or flops a second, and ``launch_seconds``, the time of an operator on one element
        (on a GPU from the host, and in a CUDA graph); ``operators``: a list with each one's seconds, flops, bytes and
        ``share`` of the roofline.
    """
    sizes = sizes or (LARGE if device.type == "cuda" else SMALL)
    timer = stopwatch(device)[1]

    def time(step: Callable[[], object]) -> float:
        return alternate({"it": step}, seconds, measure=timer)["it"].median

    ceilings: dict[str, float] = {}
    for work in (*_copies(device, sizes), *_products(device, sizes)):
        ceilings[work.name] = (work.flops or work.bytes) / time(work.step)
    ceilings["launch_seconds"] = time(_tiny(device))
    if device.type == "cuda":
        ceilings["launch_seconds_in_a_graph"] = time(_tiny_graph(device)) / _TINY_CALLS
    operators = []
    for work in _operators(device, sizes):
        took = time(work.step)
        operators.append(
            {
                "name": work.name,
                "seconds": took,
                "flops": work.flops,
                "bytes": work.bytes,
                "share": share(work, took, ceilings["copy_bytes_per_second"], ceilings["float32_flops_per_second"]),
            }
        )
    return {"ceilings": ceilings, "operators": operators}


def share(work: Work, seconds: float, bytes_per_second: float, flops_per_second: float) -> float:
    """The roofline's time as a share of the measured one.

    Example:
        >>> share(Work("copy", lambda: None, flops=0, bytes=10), 2.0, bytes_per_second=10.0, flops_per_second=1.0)
        0.5
    """
    return max(work.bytes / bytes_per_second, work.flops / flops_per_second) / seconds


def _copies(device: torch.device, sizes: Sizes) -> Iterator[Work]:
    source = torch.ones(sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    yield Work("copy_bytes_per_second", lambda: target.copy_(source), 0, 2 * source.numel() * 4)


def _products(device: torch.device, sizes: Sizes) -> Iterator[Work]:
    """Of one pair of matrices in float32 and float64, and of a pair a task, as the engine has them."""

    def product(name: str, dtype: torch.dtype, *shape: int) -> Work:
        a, b = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        flops = 2 * out.numel() * shape[-1]
        return Work(name, lambda: torch.matmul(a, b, out=out), flops, 3 * out.numel() * out.element_size())

    side, small = sizes.matrix, max(1, sizes.matrix // 64)
    yield product("float32_flops_per_second", torch.float32, side, side)
    yield product("float64_flops_per_second", torch.float64, side // 2, side // 2)
    yield product(
        f"float32_flops_per_second_of_{sizes.tasks}x{small}x{small}", torch.float32, sizes.tasks, small, small
    )


# A graph of one launch would time the replay.
_TINY_CALLS = 100


def _tiny(device: torch.device) -> Callable[[], object]:
    x = torch.zeros(1, device=device)
    return lambda: x.add_(1.0)


def _tiny_graph(device: torch.device) -> Callable[[], object]:
    step = _tiny(device)
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_TINY_CALLS):
                step()
    return graph.replay


def _operators(device: torch.device, sizes: Sizes) -> Iterator[Work]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    t, p, n, d, ways = sizes.tasks, sizes.parameters, sizes.samples, sizes.features, 5
    params, grads = draw(t, p), draw(t, p)
    yield Work("inner_update", lambda: ops.inner_update(params, grads, 0.1), 2 * t * p, 3 * 4 * t * p)

    support, query = draw(t, ways, d), draw(t, n, d)
    labels, targets = (torch.arange(m, device=device).remainder(ways).repeat(t, 1) for m in (ways, n))
    # |q - p|^2 is a subtraction, a product and a sum.
    yield Work(
        "prototype_loss",
        lambda: ops.prototype_loss(support, labels, query, targets, ways),
        3 * t * n * ways * d,
        4 * t * d * (ways + n),
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = LSTMOptimizer().to(device)
    layers, hidden = optimizer.layers, optimizer.hidden
    weights = [w.detach() for w in optimizer.parameters()]
    coordinates = p
    one, state = draw(coordinates), torch.zeros(layers, 2, coordinates, hidden, device=device)
    flops = 2 * (4 * hidden * (2 + hidden) + (layers - 1) * 8 * hidden * hidden + hidden) * coordinates
    moved = 4 * coordinates * (2 + 4 * layers * hidden)
    yield Work("lstm_update", lambda: ops.lstm_update(one, state, weights), flops, moved)
