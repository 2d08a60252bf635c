"""What a meta-step has to do, counted on paper: flops, bytes and launches of the CUDA engine.

The meta-step is ``accumulate_grad`` in float32 by the engine's general way (csrc/engine/unroll.h): each function of
each layer is a call, which covers all tasks. A sweep is a gradient (forward, backward) or what a Hessian times a vector
adds to it (the tangents of both). A call's flops are the multiply-adds, twice, of linear layers and convolutions, which
have three products of a forward's size in a gradient and six in the tangents; the first layer has fewer, since nobody
asks for the derivative of its input. The way back needs each inner step's gradient again: the last one's is there
still, and all are where they are few bytes; else it is computed once more, without the weights' gradients. A call's
bytes are each value that it reads or writes, once, as if every value came from memory and none from a cache.

Its launches are those of our kernels, each of them counted; on the emulator they are the same number
(tests/test_cost.py). Not counted is what torch launches beside them: one to zero the workspace, a few for the loss,
and about two for each tensor of parameters, which is copied together and apart. Nor are matrix products by cuBLAS,
which stand in for large ones of linear layers (csrc/batched_product.h), one or two and up to two launches to finish.

So it is a model: :func:`seconds` says what it predicts, a measurement says whether it is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from metafast.bench.plan import Layer, Plan, plan
from metafast.bench.workloads import Workload, build
from metafast.engine.lowering import lower
from metafast.engine.lowering.lowered import Kind

_FLOAT = 4  # bytes
_NORMS = (Kind.layer_norm, Kind.group_norm)
# A batch norm of so many pixels of a task reduces them in one launch, with its other work, else in two of its own:
# csrc/cuda/layers/norm_launch.h.
_FEW_PIXELS = 1024


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


def cost_of(workload: Workload, first_order: bool = False) -> Cost:
    """Counts a meta-step's calls; ``first_order``: as MAML and LOMAML do it with that argument.

    Raises:
        ValueError: the network is no chain of layers, or there are no inner steps but in Prototypical Networks.
    """
    return Cost(tuple(_calls(workload, first_order)))


def _calls(w: Workload, first_order: bool) -> Iterator[Call]:
    problem = build(w.shrunk())
    network = plan(lower(problem.model, tuple(problem.episodes.support_x.shape[2:]), "batch"))
    parameters = sum(p.numel() for p in problem.model.parameters())
    support, query = (max(1, w.ways) * n for n in (w.shots, w.queries))
    yield Call("theta to engine", 0, 2 * parameters * _FLOAT)
    if w.learner == "protonets":
        yield from _prototypes(_Sweeps(network, w.tasks, support + query), support, query, w.ways, parameters)
    else:
        rule: _Rule = _Rule(w.tasks, parameters)
        if problem.optimizer is not None:
            of_lstm = problem.optimizer
            count = sum(p.numel() for p in of_lstm.weights)
            rule = _LstmRule(w.tasks, parameters, of_lstm.layers, of_lstm.hidden, count)
        if w.steps < 1:
            raise ValueError(f"workload: expected at least one inner step, got {w.steps}")
        sides = (_Sweeps(network, w.tasks, support), _Sweeps(network, w.tasks, query))
        yield from _inner_loop(*sides, w, rule, first_order)
    yield Call("sum over tasks", 0, (w.tasks + 1) * parameters * _FLOAT)
    yield Call("gradient to user", 0, 3 * parameters * _FLOAT, 2)


def _inner_loop(support: _Sweeps, query: _Sweeps, w: Workload, rule: _Rule, first_order: bool) -> Iterator[Call]:
    """meta_step of csrc/engine/unroll.h."""
    yield from query.see()
    for k in range(w.steps):
        if k == 0:
            yield from support.see()
        yield from support.gradient()
        yield from rule.step(begins=k == 0)
    yield from query.forward()
    yield query.outputs("copy outputs", 2)
    yield query.outputs("loss", 2)
    yield Call("add loss", 0, 2 * w.tasks * _FLOAT)
    if w.loss == "cross_entropy":
        yield query.outputs("accuracy", 1)
    yield from query.backward()
    kept = support.plan.keeps(support.samples, w.steps)
    for k in reversed(range(w.steps)):
        if k == 0 and not first_order:
            yield from support.see()
        if k < w.steps - 1 and not kept and not first_order:
            yield from support.gradient(of_weights=False)
        yield from rule.pull(k == w.steps - 1, first_order)
        if not first_order:
            yield from support.tangents()
            yield rule.vectors("adjoint" if k > 0 else "deliver", 3)
    yield from rule.end()
    if first_order:
        yield rule.vectors("deliver", 2)


def _prototypes(encoder: _Sweeps, support: int, query: int, ways: int, parameters: int) -> Iterator[Call]:
    """prototype_step of csrc/engine/unroll.h, by squared distances."""
    features, tasks = encoder.plan.layers[-1].result.count, encoder.tasks
    head = 2 * tasks * query * ways * features
    embedded = tasks * (support + query) * features * _FLOAT
    means, scores = (tasks * n * _FLOAT for n in (ways * features, query * ways))
    yield Call("join inputs", 0, 2 * tasks * encoder.samples * encoder.plan.source.count * _FLOAT)
    yield from encoder.see()
    yield from encoder.forward()
    yield encoder.outputs("copy outputs", 2)
    yield Call("split rows", 0, 2 * embedded)
    yield Call("means", 0, embedded + means)
    yield Call("scores", head, embedded + means + scores)
    yield Call("loss", 0, 2 * tasks * _FLOAT)
    yield Call("accuracy", 0, scores)
    yield Call("adjoint of the losses", 0, tasks * _FLOAT)
    yield Call("weights", 0, 2 * scores)
    yield Call("pull", head, 2 * embedded + means + scores)
    yield Call("spread", head, 2 * embedded + means + scores)
    yield Call("join rows", 0, 2 * embedded)
    yield encoder.outputs("set adjoint", 2)
    yield from encoder.backward()
    yield Call("deliver", 0, 2 * tasks * parameters * _FLOAT)


@dataclass(frozen=True)
class _Sweeps:
    """The network on a task's ``samples``, for all tasks."""

    plan: Plan
    tasks: int
    samples: int

    def see(self) -> Iterator[Call]:
        if self.plan.copies_input:
            yield Call("set input", 0, 2 * self.tasks * self.samples * self.plan.source.count * _FLOAT)

    def gradient(self, of_weights: bool = True) -> Iterator[Call]:
        yield from self.forward()
        yield self.outputs("loss", 2)
        yield from self.backward(of_weights)

    def forward(self) -> Iterator[Call]:
        for layer in self.plan.layers:
            values = layer.source.count + layer.result.count
            yield self._call(_name(layer), layer, 1, values, 1, self._launches(layer, layer.source.pixels))

    def backward(self, of_weights: bool = True) -> Iterator[Call]:
        for layer in reversed(self.plan.layers):
            yield from self._back(f"{_name(layer)} backward", layer, 1, of_weights)

    def tangents(self) -> Iterator[Call]:
        """What a Hessian times a vector adds to a gradient."""
        for layer in self.plan.layers:
            if not layer.live:
                continue
            products = 2 if layer.wants_dx else 1
            values = products * layer.source.count + layer.result.count
            # Without a tangent of its input a norm has nothing to reduce.
            launches = self._launches(layer, layer.source.pixels) if layer.wants_dx else 1
            yield self._call(f"{_name(layer)} tangent", layer, products, values, 2, launches)
        yield self.outputs("loss tangent", 3)
        for layer in reversed(self.plan.layers):
            yield from self._back(f"{_name(layer)} backward tangent", layer, 2)

    def outputs(self, what: str, times: int) -> Call:
        """A call that goes so many times over the outputs."""
        return Call(what, 0, times * self.tasks * self.samples * self.plan.layers[-1].result.count * _FLOAT)

    def _back(self, what: str, layer: Layer, terms: int, of_weights: bool = True) -> Iterator[Call]:
        """dx and dw, of a sum of so many products each."""
        if not layer.live:
            return
        inputs, outputs, dx = layer.source.count, layer.result.count, int(layer.wants_dx)
        read = terms * (inputs + outputs)
        if layer.lowered.flops == 0:
            launches = self._launches(layer, layer.result.pixels, applies=layer.wants_dx)
            if layer.kind in _NORMS:
                own = int(layer.lowered.bias and of_weights)
                launches = own + (dx if layer.kind == Kind.layer_norm else 1)
            elif layer.kind != Kind.batch_norm:
                launches = dx
            if launches > 0:
                yield self._call(what, layer, 0, read + dx * inputs, terms + 1, launches)
            return
        if of_weights:
            launches = 2 if layer.narrow and layer.lowered.bias else 1
            yield self._call(f"{what}, weights", layer, terms if dx else 1, read, 1, launches)
        if dx:
            # Pixels of one place in the stride see the same taps: a product of their own.
            strides, (_, *sides) = layer.lowered.stride, layer.source.chw
            phases = math.prod(min(stride, side) for stride, side in zip(strides, sides, strict=True))
            yield self._call(f"{what}, inputs", layer, terms, terms * outputs + inputs, terms, phases)

    def _launches(self, layer: Layer, pixels: int, applies: bool = True) -> int:
        if layer.kind != Kind.batch_norm or self.samples * pixels < _FEW_PIXELS:
            return 1
        return 2 + applies

    def _call(self, what: str, layer: Layer, products: int, values: int, parameters: int, launches: int) -> Call:
        flops = products * self.tasks * self.samples * layer.lowered.flops
        moved = self.tasks * (self.samples * values + parameters * layer.lowered.parameters)
        return Call(what, flops, moved * _FLOAT, launches)


def _name(layer: Layer) -> str:
    return layer.lowered.name


@dataclass(frozen=True)
class _Rule:
    """Gradient descent with one rate, on the parameters of all tasks."""

    tasks: int
    parameters: int

    def vectors(self, what: str, times: int, launches: int = 1) -> Call:
        """A call that goes so many times over all parameters."""
        return Call(what, 0, times * self.tasks * self.parameters * _FLOAT, launches)

    def step(self, begins: bool) -> Iterator[Call]:
        coordinates = self.tasks * self.parameters
        yield Call("update", 2 * coordinates, 3 * coordinates * _FLOAT)

    def pull(self, begins: bool, first_order: bool) -> Iterator[Call]:
        """The way back through a step."""
        yield from ()

    def end(self) -> Iterator[Call]:
        yield from ()


@dataclass(frozen=True)
class _LstmRule(_Rule):
    """By a coordinatewise LSTM: LearnedRule of csrc/cuda/rules.h."""

    layers: int
    hidden: int
    weights: int

    def step(self, begins: bool) -> Iterator[Call]:
        if begins:
            yield self._states("start", 1)
        yield self.vectors("to coordinates", 3, 2)
        # The state is read and written.
        yield self._lstm("LSTM", 1, 2 + 2 * self._state)
        yield self.vectors("update", 3)

    def pull(self, begins: bool, first_order: bool) -> Iterator[Call]:
        """Forward once more, and two products for each one of it; then a sum over blocks for the weights."""
        if begins:
            yield self._states("no cotangent of the state", 1)
        yield self.vectors("to coordinates", 3, 2)
        yield self._lstm("LSTM backward", 3, 3 + 3 * self._state, 2)
        yield Call("sum over steps", 0, 3 * self.tasks * self.weights * _FLOAT)
        if not first_order:
            yield self.vectors("direction", 2)

    def end(self) -> Iterator[Call]:
        yield Call("sum of the LSTM's over tasks", 0, (self.tasks + 1) * self.weights * _FLOAT)

    @property
    def _state(self) -> int:
        """Numbers of a coordinate: h and c of each layer."""
        return 2 * self.layers * self.hidden

    def _states(self, what: str, times: int) -> Call:
        return Call(what, 0, times * self.tasks * self.parameters * self._state * _FLOAT)

    def _lstm(self, what: str, sweeps: int, moved: int, launches: int = 1) -> Call:
        coordinates = self.tasks * self.parameters
        return Call(what, sweeps * coordinates * self._flops, coordinates * moved * _FLOAT, launches)

    @property
    def _flops(self) -> int:
        """Of a coordinate: four gates of the inputs (two, by log and sign) and the state, and the output."""
        first, others = 4 * self.hidden * (2 + self.hidden), 4 * self.hidden * 2 * self.hidden
        return 2 * (first + (self.layers - 1) * others + self.hidden)
