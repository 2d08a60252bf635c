"""A lowered network as data: what the native engine needs to know of a module, and nothing of torch.

Numbers and meanings are those of csrc/engine/program.h and stay in step with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

LOSSES = {"cross_entropy": 1, "mse": 2}


class Kind(IntEnum):
    """``enum class Kind`` of csrc/engine/program.h."""

    linear = 1
    conv2d = 2
    batch_norm = 3
    layer_norm = 4
    group_norm = 5
    relu = 6
    leaky_relu = 7
    elu = 8
    tanh = 9
    sigmoid = 10
    gelu = 11
    gelu_tanh = 12
    silu = 13
    softplus = 14
    max_pool = 15
    avg_pool = 16
    flatten = 17
    add = 18


@dataclass(frozen=True)
class LoweredLayer:
    """One layer.

    Attributes:
        name: qualified name in the module ("layers.0"), or of the operation in the forward ("relu").
        kind: what it computes.
        inputs: indices of its values: 0 is the network's input, layer i writes value i + 1.
        output: shape of one sample, (C, H, W) or (D,).
        channels: linear: out_features; conv2d: out_channels; else those of the output.
        kernel, stride, padding: of conv2d and the pools, (height, width).
        groups: of group_norm.
        bias: linear, conv2d: has one; norms: is affine; avg_pool: count_include_pad.
        number, number1: norms: eps; leaky_relu: slope; elu: alpha; softplus: beta, threshold.
        weight, bias_offset: where its weight and bias (gamma and beta) begin in the flat vector, -1 where it has none.
        parameters: how many it has.
        flops: twice the multiply-adds of a linear layer's or convolution's forward for one sample; 0 for the rest.
    """

    name: str
    kind: Kind
    inputs: tuple[int, ...]
    output: tuple[int, ...]
    channels: int
    kernel: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    bias: bool = False
    number: float = 0.0
    number1: float = 0.0
    weight: int = -1
    bias_offset: int = -1
    parameters: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Lowered:
    """A network: the last layer's output is its output.

    Attributes:
        input: shape of one sample as the engine sees it, (C, H, W) or (D,): the same elements in the same order as the
            module's own samples.
        layers: in order of execution; every one is needed for the output.
        output: shape of one sample, (D,).
        adapting: P, length of the module's :class:`~metafast.engine.layout.Layout`.
        constants: names of the frozen parameters that layers use. They follow the P adapting ones in the flat vector.
        constant_elements: how many numbers they are.
    """

    input: tuple[int, ...]
    layers: tuple[LoweredLayer, ...]
    output: tuple[int, ...]
    adapting: int
    constants: tuple[str, ...]
    constant_elements: int

    @property
    def length(self) -> int:
        """Length of the flat vector: the adapting parameters, then the constants."""
        return self.adapting + self.constant_elements

    @property
    def flops(self) -> int:
        """Of one forward for one sample."""
        return sum(layer.flops for layer in self.layers)

    def descriptor(self, loss: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The network as integers and floats, as the extension parses them.

        integers: loss (1 cross_entropy, 2 mse), C, H, W of the input (D, 1, 1 for features), numbers of adapting and of
        constant parameters, number of layers, then 16 for each layer: kind, input, second input or -1, channels, kernel
        h, w, stride h, w, padding h, w, groups, bias, weight, bias offset, 0, 0. floats: number and number1 of each.
        """
        c, h, w = self.input if len(self.input) == 3 else (self.input[0], 1, 1)
        integers = [LOSSES[loss], c, h, w, self.adapting, self.constant_elements, len(self.layers)]
        floats: list[float] = []
        for layer in self.layers:
            second = layer.inputs[1] if len(layer.inputs) == 2 else -1
            integers += [int(layer.kind), layer.inputs[0], second, layer.channels]
            integers += [*layer.kernel, *layer.stride, *layer.padding]
            integers += [layer.groups, int(layer.bias), layer.weight, layer.bias_offset, 0, 0]
            floats += [layer.number, layer.number1]
        return tuple(integers), tuple(floats)


def elements(shape: tuple[int, ...]) -> int:
    """How many numbers a sample of this shape has."""
    return math.prod(shape)
