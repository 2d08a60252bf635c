"""A lowered network run by torch's operations: slow and plain, to check the lowering with.

No fast path: :func:`metafast.engine.lowering.lower` compares it once with the module itself, and so do the tests.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from metafast.engine.lowering.lowered import Kind, Lowered, LoweredLayer, elements


def replay(lowered: Lowered, flat: Tensor, x: Tensor) -> Tensor:
    """Outputs (N, D) for samples x (N, ...) with the flat parameter vector; differentiable in both.

    Raises:
        ValueError: a vector of another length, or a layer whose output is not of the shape it was lowered to.
    """
    if flat.shape != (lowered.length,):
        raise ValueError(f"flat: expected ({lowered.length},), got {tuple(flat.shape)}")
    values = [x.reshape(x.shape[0], *lowered.input)]
    for layer in lowered.layers:
        inputs = [values[i] for i in layer.inputs]
        value = _run(layer, flat, *inputs)
        if value.shape[1:] != layer.output:
            raise ValueError(f"layer {layer.name!r}: expected {layer.output} a sample, got {tuple(value.shape[1:])}")
        values.append(value)
    return values[-1]


def _run(layer: LoweredLayer, flat: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    def part(offset: int, *shape: int) -> Tensor | None:
        return None if offset < 0 else flat[offset : offset + elements(shape)].view(shape)

    c = layer.channels
    kind = layer.kind
    if kind is Kind.linear:
        weight = part(layer.weight, c, x.shape[1])
        assert weight is not None
        return F.linear(x, weight, part(layer.bias_offset, c))
    if kind is Kind.conv2d:
        weight = part(layer.weight, c, x.shape[1], *layer.kernel)
        assert weight is not None
        return F.conv2d(x, weight, part(layer.bias_offset, c), layer.stride, layer.padding)
    if kind is Kind.batch_norm:
        gamma, beta = part(layer.weight, c), part(layer.bias_offset, c)
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=layer.number)
    if kind is Kind.layer_norm:
        gamma, beta = part(layer.weight, *layer.output), part(layer.bias_offset, *layer.output)
        return F.layer_norm(x, layer.output, gamma, beta, layer.number)
    if kind is Kind.group_norm:
        return F.group_norm(x, layer.groups, part(layer.weight, c), part(layer.bias_offset, c), layer.number)
    if kind is Kind.max_pool:
        return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
    if kind is Kind.avg_pool:
        return F.avg_pool2d(x, layer.kernel, layer.stride, layer.padding, count_include_pad=layer.bias)
    if kind is Kind.flatten:
        return x.flatten(1)
    if kind is Kind.add:
        assert other is not None
        return x + other
    return _activation(layer, x)


def _activation(layer: LoweredLayer, x: Tensor) -> Tensor:
    kind = layer.kind
    if kind is Kind.relu:
        return F.relu(x)
    if kind is Kind.leaky_relu:
        return F.leaky_relu(x, layer.number)
    if kind is Kind.elu:
        return F.elu(x, layer.number)
    if kind is Kind.tanh:
        return x.tanh()
    if kind is Kind.sigmoid:
        return x.sigmoid()
    if kind is Kind.gelu:
        return F.gelu(x)
    if kind is Kind.gelu_tanh:
        return F.gelu(x, approximate="tanh")
    if kind is Kind.silu:
        return F.silu(x)
    assert kind is Kind.softplus
    return F.softplus(x, layer.number, layer.number1)
