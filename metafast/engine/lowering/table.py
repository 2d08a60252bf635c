"""The lowering table: what each of torch's modules, functions and methods is to the engine.

A row takes the arguments that torch's function takes, by the same names, so that a call binds to it as to torch's.
What has no row is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from metafast.engine.lowering.build import Value
from metafast.engine.lowering.call import Call
from metafast.engine.lowering.lowered import Kind
from metafast.engine.lowering.rows import (
    Row,
    activation,
    adaptive_avg_pool2d,
    add,
    add_in_place,
    avg_pool2d,
    batch_norm,
    conv2d,
    dropout,
    elu,
    gelu,
    group_norm,
    identity,
    in_place,
    layer_norm,
    leaky_relu,
    linear,
    max_pool2d,
    pointwise,
    softplus,
)
from metafast.engine.lowering.views import (
    arithmetic,
    attribute,
    dim,
    flatten,
    item,
    length,
    reshape,
    size,
    squeeze,
    unflatten,
    unsqueeze,
    view,
)


def _batch_norm(rank: int) -> Row:
    def row(call: Call, m: Any, input: object) -> Value:
        value = call.features(input) if rank == 1 else call.image(input)
        if call.batch_norm != "batch":
            call.refuse("uses running statistics by batch_norm='running': these go by torch")
        if value.shape[0] != m.num_features:
            call.refuse(f"does not take samples of shape {value.shape}: it has {m.num_features} channels")
        return batch_norm(call, value, None, None, call.own(m.weight), call.own(m.bias), True, 0.0, m.eps)

    return row


def _conv2d(call: Call, m: nn.Conv2d, input: object) -> Value:
    call.only("padding_mode", m.padding_mode, "zeros")
    weight, bias = call.own(m.weight), call.own(m.bias)
    return conv2d(call, input, weight, bias, m.stride, m.padding, m.dilation, m.groups)


def _max_pool2d(call: Call, m: nn.MaxPool2d, input: object) -> Value:
    return max_pool2d(call, input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool2d(call: Call, m: nn.AvgPool2d, input: object) -> Value:
    window = m.kernel_size, m.stride, m.padding
    return avg_pool2d(call, input, *window, m.ceil_mode, m.count_include_pad, m.divisor_override)


def _dropout(call: Call, m: Any, input: object) -> Value:
    return dropout(call, input, m.p, m.training, m.inplace)


def _group_norm(call: Call, m: nn.GroupNorm, input: object) -> Value:
    value = call.either(input)
    if value.shape[0] != m.num_channels:
        call.refuse(f"does not take samples of shape {value.shape}: it has {m.num_channels} channels")
    return group_norm(call, value, m.num_groups, call.own(m.weight), call.own(m.bias), m.eps)


# Of exactly these classes: a subclass may do anything. (call, module, input) -> output.
MODULES: dict[type[nn.Module], Row] = {
    nn.Linear: lambda call, m, input: linear(call, input, call.own(m.weight), call.own(m.bias)),
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm(1),
    nn.BatchNorm2d: _batch_norm(2),
    nn.LayerNorm: lambda call, m, input: layer_norm(
        call, input, m.normalized_shape, call.own(m.weight), call.own(m.bias), m.eps
    ),
    nn.GroupNorm: _group_norm,
    nn.ReLU: lambda call, m, input: pointwise(call, Kind.relu, input, m.inplace),
    nn.LeakyReLU: lambda call, m, input: leaky_relu(call, input, m.negative_slope, m.inplace),
    nn.ELU: lambda call, m, input: elu(call, input, m.alpha, m.inplace),
    nn.Tanh: lambda call, m, input: pointwise(call, Kind.tanh, input, False),
    nn.Sigmoid: lambda call, m, input: pointwise(call, Kind.sigmoid, input, False),
    nn.GELU: lambda call, m, input: gelu(call, input, m.approximate),
    nn.SiLU: lambda call, m, input: pointwise(call, Kind.silu, input, m.inplace),
    nn.Softplus: lambda call, m, input: softplus(call, input, m.beta, m.threshold),
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: lambda call, m, input: adaptive_avg_pool2d(call, input, m.output_size),
    nn.Flatten: lambda call, m, input: flatten(call, input, m.start_dim, m.end_dim),
    nn.Unflatten: lambda call, m, input: unflatten(call, input, m.dim, m.unflattened_size),
    nn.Identity: lambda call, m, input: identity(call, input),
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.FeatureAlphaDropout: _dropout,
}

_RELU, _TANH, _SIGMOID = activation(Kind.relu), activation(Kind.tanh), activation(Kind.sigmoid)

FUNCTIONS: dict[Callable[..., Any], Row] = {
    F.linear: linear,
    F.conv2d: conv2d,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.relu: _RELU,
    torch.relu: lambda call, input: _RELU(call, input),
    torch.relu_: lambda call, input: _RELU(call, input, True),
    F.leaky_relu: leaky_relu,
    F.leaky_relu_: in_place(leaky_relu),
    F.elu: elu,
    F.elu_: in_place(elu),
    torch.tanh: lambda call, input: _TANH(call, input),
    torch.tanh_: lambda call, input: _TANH(call, input, True),
    torch.sigmoid: lambda call, input: _SIGMOID(call, input),
    torch.sigmoid_: lambda call, input: _SIGMOID(call, input, True),
    F.silu: activation(Kind.silu),
    F.gelu: gelu,
    F.softplus: softplus,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.dropout: dropout,
    F.dropout1d: dropout,
    F.dropout2d: dropout,
    F.dropout3d: dropout,
    F.alpha_dropout: dropout,
    F.feature_alpha_dropout: dropout,
    torch.flatten: flatten,
    torch.unflatten: unflatten,
    torch.reshape: reshape,
    torch.unsqueeze: unsqueeze,
    torch.squeeze: squeeze,
    torch.add: add,
    operator.add: add,
    operator.iadd: add_in_place,
    operator.mul: arithmetic(operator.mul),
    operator.sub: arithmetic(operator.sub),
    operator.floordiv: arithmetic(operator.floordiv),
    operator.getitem: item,
    getattr: attribute,
    len: length,
}

METHODS: dict[str, Row] = {
    "relu": FUNCTIONS[torch.relu],
    "relu_": FUNCTIONS[torch.relu_],
    "tanh": FUNCTIONS[torch.tanh],
    "tanh_": FUNCTIONS[torch.tanh_],
    "sigmoid": FUNCTIONS[torch.sigmoid],
    "sigmoid_": FUNCTIONS[torch.sigmoid_],
    "add": add,
    "add_": add_in_place,
    "flatten": flatten,
    "unflatten": unflatten,
    "view": view,
    "reshape": reshape,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "contiguous": identity,
    "size": size,
    "dim": dim,
}


def reads_shape(node: Node) -> bool:
    """Whether a call looks at its tensor's shape alone."""
    if node.op == "call_function":
        return node.target is len or (node.target is getattr and node.args[1] in ("shape", "ndim"))
    return node.op == "call_method" and node.target in ("size", "dim")
