"""What the CUDA engine makes of a chain of layers in float32: layers after fusion, and whether inner steps are kept.

For :mod:`metafast.bench.cost`, which counts work where no extension need be there. It follows csrc/engine/build.cpp,
fuse() to make_pass(), for networks in which each layer reads the one before; tests/test_cost.py holds it to the
engine by the launches of the emulator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from metafast.engine.lowering import Lowered, LoweredLayer
from metafast.engine.lowering.lowered import Kind

_LANES = 16  # of 64 bytes
_FLOAT = 4  # bytes
_KEPT_BYTES = 512 * 1024
_PRODUCTS = (Kind.linear, Kind.conv2d)


@dataclass
class Value:
    """The network's input or a layer's output: shape of a sample, and whether parameters come before it."""

    shape: tuple[int, ...]
    live: bool = False
    border: int = 0
    exact: bool = False

    @property
    def chw(self) -> tuple[int, int, int]:
        """Features are channels of one pixel."""
        c, h, w = self.shape if len(self.shape) == 3 else (self.shape[0], 1, 1)
        return c, h, w

    @property
    def count(self) -> int:
        """Elements of a sample."""
        return math.prod(self.shape)

    @property
    def pixels(self) -> int:
        """Of a sample, without borders."""
        return self.chw[1] * self.chw[2]

    @property
    def pixel(self) -> int:
        """Elements of a pixel in memory."""
        return self.chw[0] if self.exact else _whole(self.chw[0])

    @property
    def sample(self) -> int:
        """Elements of a sample in memory."""
        _, h, w = self.chw
        return (h + 2 * self.border) * (w + 2 * self.border) * self.pixel


@dataclass
class Layer:
    """A layer after fusion: ``lowered`` is its first part, ``result`` what its last part writes.

    Attributes:
        narrow: a linear layer of few outputs, whose biases' gradient is a launch of its own.
        pooled: an affine batch norm with ReLU and, where one follows, a plain max-pool.
    """

    lowered: LoweredLayer
    source: Value
    result: Value
    narrow: bool = False
    pooled: bool = False

    @property
    def kind(self) -> Kind:
        """Of its first part."""
        return self.lowered.kind

    @property
    def wants_dx(self) -> bool:
        """Whether its input has an adjoint, and so a tangent."""
        return self.source.live

    @property
    def live(self) -> bool:
        """Whether its output has an adjoint and a tangent."""
        return self.result.live

    def saved(self, samples: int) -> int:
        """Elements that its forward leaves for the way back: decide_saved(), without Winograd's."""
        c, _, _ = self.result.chw
        if self.kind in _PRODUCTS and not self.narrow:
            return math.prod(self.lowered.kernel) * c * self.source.pixel if self.wants_dx else 0
        if self.kind == Kind.batch_norm:
            maps = 2 * self.result.pixels * self.source.pixel if self.pooled else 0
            return maps * samples + 4 * self.source.pixel
        if self.kind == Kind.layer_norm:
            return 4 * samples
        if self.kind == Kind.group_norm:
            return 4 * self.source.pixel * samples
        if self.kind == Kind.max_pool:
            share = 4 if math.prod(self.lowered.kernel) <= 256 else 1
            return self.result.pixels * self.result.pixel // share * samples
        return 0


@dataclass(frozen=True)
class Plan:
    """A network as the engine runs it on CUDA.

    Attributes:
        layers: in order.
        source: the network's input.
    """

    layers: tuple[Layer, ...]
    source: Value = field(repr=False)

    @property
    def copies_input(self) -> bool:
        """Whether inputs go to memory of the engine's, with borders and whole vectors."""
        return self.source.sample != self.source.chw[0]

    def keeps(self, samples: int, steps: int) -> bool:
        """Whether a meta-step keeps what all inner steps computed, so that the way back need not do it again."""
        step = 0
        for layer in self.layers:
            out = samples * layer.result.sample
            step += _whole(layer.saved(samples)) + _whole(out) * (2 if layer.live else 1)
        return steps > 1 and steps * step * _FLOAT <= _KEPT_BYTES


def plan(network: Lowered) -> Plan:
    """Fuses, and finds out how values lie in memory.

    Raises:
        ValueError: some layer does not read the one before.
    """
    for at, lowered in enumerate(network.layers):
        if lowered.inputs != (at,):
            raise ValueError(f"network: expected a chain of layers, got layer {lowered.name!r} with another input")
    source = Value(network.input)
    layers = _fused(network.layers, source)
    for layer in layers:
        layer.result.live = layer.lowered.parameters > 0 or layer.source.live
    for layer in layers:
        if layer.kind in _PRODUCTS:
            _widen_borders(layer)
    source.exact = layers[0].kind in _PRODUCTS
    return Plan(tuple(layers), source)


def _fused(lowered: tuple[LoweredLayer, ...], source: Value) -> list[Layer]:
    layers: list[Layer] = []
    rest = list(lowered)
    while rest:
        first = rest.pop(0)
        if first.kind == Kind.linear:  # the engine's own words for it
            first = replace(first, kernel=(1, 1), stride=(1, 1), padding=(0, 0))
        kinds = [layer.kind for layer in rest[:2]]
        layer = Layer(first, layers[-1].result if layers else source, Value(first.output))
        if first.kind == Kind.batch_norm and first.bias and kinds[:1] == [Kind.relu]:
            rest.pop(0)
            layer.pooled = True
            if kinds[1:] == [Kind.max_pool] and _is_plain_pool(rest[0]):
                layer.result = Value(rest.pop(0).output)
        elif first.kind == Kind.linear and kinds == [Kind.relu, Kind.linear]:
            rest.pop(0)
        elif first.kind == Kind.linear:
            layer.narrow = bool(layers) and 4 * first.channels <= _LANES
        layers.append(layer)
    return layers


def _is_plain_pool(pool: LoweredLayer) -> bool:
    """Of square windows, side by side."""
    k = pool.kernel[0]
    return pool.kernel == pool.stride == (k, k) and pool.padding == (0, 0)


def _widen_borders(layer: Layer) -> None:
    """As wide as what reads beyond the edges needs: decide_borders()."""
    low = layer.lowered
    layer.source.border = max(layer.source.border, *low.padding)
    if not layer.wants_dx:
        return
    for axis in (0, 1):
        size, outputs = layer.source.chw[1 + axis], layer.result.chw[1 + axis]
        kernel, stride, pad = low.kernel[axis], low.stride[axis], low.padding[axis]
        before, after = -((pad - (kernel - 1)) // stride), (size - 1 + pad) // stride - (outputs - 1)
        layer.result.border = max(layer.result.border, before, after)


def _whole(count: int) -> int:
    """Rounded up to whole vectors."""
    return -(-count // _LANES) * _LANES
