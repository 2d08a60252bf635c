"""What a meta-step has to do, counted on paper: flops, bytes and launches of the CUDA engine.

A sweep is a gradient (forward, backward) or a Hessian times a vector (these and the tangents of both), a call for each
function of each layer, which covers all tasks. A call's flops are the multiply-adds, twice, of linear layers and
convolutions, which have three products of a forward's size in a gradient and nine in a Hessian times a vector; the
first layer has fewer, since nobody asks for the derivative of its input. A call's bytes are each value that it reads
or writes, once, as if every value came from memory and none from a cache. Its launches are one, but two for the
backward of a layer with a matrix of weights, whose two results are products of different shapes.

So it is a model: :func:`seconds` says what it predicts, a measurement says whether it is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from metafast.bench.workloads import Workload, build
from metafast.engine.lowering import LoweredLayer, lower
from metafast.engine.lowering.lowered import Kind

_FLOAT = 4  # bytes
# An activation that the engine fuses with what goes before it, of these.
_FUSED_WITH = (Kind.linear, Kind.batch_norm)
# prototype_means, _scores and what they need; weights, pull and spread on the way back.
_HEAD_LAUNCHES = 3


@dataclass(frozen=True)
class Call:
    """Work between two dependences: ``launches`` of kernels that share flops and bytes."""

    what: str
    flops: int
    bytes: int
    launches: int = 1


@dataclass(frozen=True)
class Cost:
    """The calls of a meta-step, in order."""

    calls: tuple[Call, ...]

    @property
    def flops(self) -> int:
        """Of all calls."""
        return sum(call.flops for call in self.calls)

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(call.bytes for call in self.calls)

    @property
    def launches(self) -> int:
        """Of all calls."""
        return sum(call.launches for call in self.calls)

    def json(self) -> dict[str, int]:
        """The sums."""
        return {"flops": self.flops, "bytes": self.bytes, "launches": self.launches}


def seconds(cost: Cost, flops_per_second: float, bytes_per_second: float, launch_seconds: float) -> float:
    """What the roofline predicts: each call takes the longest of its flops, its bytes and its launches.

    Example:
        >>> seconds(Cost((Call("a", flops=10, bytes=4), Call("b", 0, 4))), 5.0, 8.0, 1.0)
        3.0
    """
    return sum(
        max(call.flops / flops_per_second, call.bytes / bytes_per_second, call.launches * launch_seconds)
        for call in cost.calls
    )


@dataclass(frozen=True)
class _Layer:
    """A layer after fusion: flops of a sample's forward, elements of a sample's input and output, parameters."""

    name: str
    flops: int
    inputs: int
    outputs: int
    parameters: int
    first: bool


def cost_of(workload: Workload) -> Cost:
    """Counts a meta-step's calls, in float32, by the engine's general way: a launch a function of a layer."""
    return Cost(tuple(_calls(workload)))


def _calls(w: Workload) -> Iterator[Call]:
    problem = build(w.shrunk())
    sample = tuple(problem.episodes.support_x.shape[2:])
    layers = _fused(lower(problem.model, sample, "batch").layers, math.prod(sample))
    parameters = sum(p.numel() for p in problem.model.parameters())
    support, query = (max(1, w.ways) * n for n in (w.shots, w.queries))
    everything = w.tasks * parameters * _FLOAT
    if w.learner == "protonets":
        yield from _forward(layers, w.tasks, support + query)
        head = 2 * w.tasks * query * w.ways * layers[-1].outputs
        embedded = w.tasks * (support + query) * layers[-1].outputs * _FLOAT
        yield Call("head", head, embedded, _HEAD_LAUNCHES)
        yield Call("head backward", 2 * head, 2 * embedded, _HEAD_LAUNCHES)
        yield from _backward(layers, w.tasks, support + query)
        return
    learned = None if problem.optimizer is None else (problem.optimizer.layers, problem.optimizer.hidden)
    for _ in range(w.steps):
        yield from _gradient(layers, w.tasks, support)
        yield _update(w.tasks * parameters, learned)
    yield from _gradient(layers, w.tasks, query)
    for _ in range(w.steps):
        if learned is not None:
            yield _update_backward(w.tasks * parameters, *learned)
        yield from _hessian(layers, w.tasks, support)
        yield Call("adjoint", 0, 3 * everything)
    yield Call("sum over tasks", 0, everything)


def _fused(lowered: tuple[LoweredLayer, ...], inputs: int) -> list[_Layer]:
    """linear + relu as one, and batch norm + relu + max-pool."""
    layers: list[_Layer] = []
    kinds: list[Kind] = []
    for layer in lowered:
        outputs = math.prod(layer.output)
        if kinds and (
            (layer.kind == Kind.relu and kinds[-1] in _FUSED_WITH)
            or (layer.kind == Kind.max_pool and kinds[-2:] == [Kind.batch_norm, Kind.relu])
        ):
            before = layers.pop()
            layers.append(_Layer(before.name, before.flops, before.inputs, outputs, before.parameters, before.first))
        else:
            layers.append(_Layer(layer.name, layer.flops, inputs, outputs, layer.parameters, not layers))
        kinds.append(layer.kind)
        inputs = outputs
    return layers


def _gradient(layers: list[_Layer], tasks: int, samples: int) -> Iterator[Call]:
    yield from _forward(layers, tasks, samples)
    yield Call("loss", 0, 2 * tasks * samples * layers[-1].outputs * _FLOAT)
    yield from _backward(layers, tasks, samples)


def _hessian(layers: list[_Layer], tasks: int, samples: int) -> Iterator[Call]:
    yield from _gradient(layers, tasks, samples)
    for layer in layers:
        products = 0 if layer.flops == 0 else 1 if layer.first else 2
        values = (1 if layer.first else 2) * layer.inputs + layer.outputs
        yield _call(f"{layer.name} tangent", layer, tasks, samples, products, values, 2)
    yield Call("loss tangent", 0, 3 * tasks * samples * layers[-1].outputs * _FLOAT)
    for layer in reversed(layers):
        yield from _back(f"{layer.name} backward tangent", layer, tasks, samples, 2)


def _forward(layers: list[_Layer], tasks: int, samples: int) -> Iterator[Call]:
    for layer in layers:
        yield _call(layer.name, layer, tasks, samples, 1, layer.inputs + layer.outputs, 1)


def _backward(layers: list[_Layer], tasks: int, samples: int) -> Iterator[Call]:
    for layer in reversed(layers):
        yield from _back(f"{layer.name} backward", layer, tasks, samples, 1)


def _back(what: str, layer: _Layer, tasks: int, samples: int, terms: int) -> Iterator[Call]:
    """dx and dw, of a sum of so many products each."""
    read = terms * (layer.inputs + layer.outputs)
    if layer.flops == 0:
        yield _call(what, layer, tasks, samples, 0, read + layer.inputs, terms + 1)
        return
    # The inputs of the first layer have no tangent.
    yield _call(f"{what}, weights", layer, tasks, samples, 1 if layer.first else terms, read, 1)
    if not layer.first:
        yield _call(f"{what}, inputs", layer, tasks, samples, terms, terms * layer.outputs + layer.inputs, terms)


def _call(what: str, layer: _Layer, tasks: int, samples: int, products: int, values: int, parameters: int) -> Call:
    moved = tasks * (samples * values + parameters * layer.parameters)
    return Call(what, products * tasks * samples * layer.flops, moved * _FLOAT)


def _update(coordinates: int, learned: tuple[int, int] | None) -> Call:
    if learned is None:
        return Call("update", 2 * coordinates, 3 * coordinates * _FLOAT)
    layers, hidden = learned
    # The state is read and written: h and c of each layer.
    return Call("update by the LSTM", coordinates * _lstm(*learned), coordinates * (3 + 4 * layers * hidden) * _FLOAT)


def _update_backward(coordinates: int, layers: int, hidden: int) -> Call:
    """Forward once more, and two products for each one of it; a reduction over blocks for the weights."""
    moved = coordinates * (3 + 6 * layers * hidden) * _FLOAT
    return Call("LSTM backward", 3 * coordinates * _lstm(layers, hidden), moved, 2)


def _lstm(layers: int, hidden: int) -> int:
    """Flops of a coordinate: four gates of the inputs (two, by log and sign) and the state, and the output."""
    return 2 * (4 * hidden * (2 + hidden) + (layers - 1) * 4 * hidden * 2 * hidden + hidden)
