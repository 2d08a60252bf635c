"""Rows of the lowering table that make layers; see :mod:`metafast.engine.lowering.table`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metafast.engine.lowering.build import Shape, Value
from metafast.engine.lowering.call import Call
from metafast.engine.lowering.lowered import Kind, elements

Row = Callable[..., object]


def linear(call: Call, input: object, weight: object, bias: object = None) -> Value:
    x, w = call.features(input), call.weight("weight", weight)
    if len(w.shape) != 2:
        call.refuse(f"takes a weight of shape (out, in), got {w.shape}")
    b = call.optional("bias", bias, w.shape[:1])
    if x.shape[0] != w.shape[1]:
        call.refuse(f"does not take samples of shape {x.shape}: it has {w.shape[1]} inputs")
    return call.layer(Kind.linear, (x,), w.shape[:1], (w, b), bias=b is not None, flops=2 * elements(w.shape))


def conv2d(
    call: Call,
    input: object,
    weight: object,
    bias: object = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: object = 1,
) -> Value:
    x, w = call.image(input), call.weight("weight", weight)
    if len(w.shape) != 4:
        call.refuse(f"takes a weight of shape (out, in, height, width), got {w.shape}")
    b = call.optional("bias", bias, w.shape[:1])
    call.only("dilation", call.pair("dilation", dilation), (1, 1))
    call.only("groups", groups, 1)
    kernel, step = (w.shape[2], w.shape[3]), call.pair("stride", stride)
    around = _padding(call, padding, kernel, step)
    if x.shape[0] != w.shape[1]:
        call.refuse(f"does not take samples of shape {x.shape}: it has {w.shape[1]} input channels")
    output = (w.shape[0], *call.window(x, kernel, step, around))
    return call.layer(
        Kind.conv2d,
        (x,),
        output,
        (w, b),
        kernel=kernel,
        stride=step,
        padding=around,
        bias=b is not None,
        flops=2 * elements(w.shape) * elements(output[1:]),
    )


def _padding(call: Call, padding: object, kernel: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding == "same":
        call.only("stride", stride, (1, 1))
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            call.refuse(f"pads unevenly: padding='same' with a kernel of {kernel[0]}x{kernel[1]}")
        return kernel[0] // 2, kernel[1] // 2
    return call.pair("padding", padding)


def max_pool2d(
    call: Call,
    input: object,
    kernel_size: object,
    stride: object = None,
    padding: object = 0,
    dilation: object = 1,
    ceil_mode: object = False,
    return_indices: object = False,
) -> Value:
    call.only("dilation", call.pair("dilation", dilation), (1, 1))
    call.only("return_indices", return_indices, False)
    return _pool(call, Kind.max_pool, input, (kernel_size, stride, padding), ceil_mode)


def avg_pool2d(
    call: Call,
    input: object,
    kernel_size: object,
    stride: object = None,
    padding: object = 0,
    ceil_mode: object = False,
    count_include_pad: object = True,
    divisor_override: object = None,
) -> Value:
    call.only("divisor_override", divisor_override, None)
    counts = call.flag("count_include_pad", count_include_pad)
    return _pool(call, Kind.avg_pool, input, (kernel_size, stride, padding), ceil_mode, counts)


def _pool(
    call: Call, kind: Kind, input: object, window: tuple[object, object, object], ceil_mode: object, bias: bool = False
) -> Value:
    call.only("ceil_mode", ceil_mode, False)
    x = call.image(input)
    kernel = call.pair("kernel_size", window[0])
    stride = kernel if window[1] in (None, [], ()) else call.pair("stride", window[1])
    padding = call.pair("padding", window[2])
    if any(p > k // 2 for p, k in zip(padding, kernel)):
        call.refuse(f"has the padding {padding}, more than half of its kernel {kernel}")
    output = (x.shape[0], *call.window(x, kernel, stride, padding))
    return call.layer(kind, (x,), output, kernel=kernel, stride=stride, padding=padding, bias=bias)


def adaptive_avg_pool2d(call: Call, input: object, output_size: object) -> Value:
    call.only("output_size", call.pair("output_size", output_size), (1, 1))
    x = call.image(input)
    whole = (x.shape[1], x.shape[2])
    return call.layer(Kind.avg_pool, (x,), (x.shape[0], 1, 1), kernel=whole, stride=whole, bias=True)


def batch_norm(
    call: Call,
    input: object,
    running_mean: object,
    running_var: object,
    weight: object = None,
    bias: object = None,
    training: object = False,
    momentum: object = 0.1,
    eps: object = 1e-5,
) -> Value:
    if running_mean is not None or running_var is not None or training is not True:
        call.refuse("may use running statistics: these go by torch")
    x = call.either(input)
    return _norm(call, Kind.batch_norm, x, weight, bias, eps, x.shape[:1])


def layer_norm(
    call: Call,
    input: object,
    normalized_shape: object,
    weight: object = None,
    bias: object = None,
    eps: object = 1e-5,
) -> Value:
    x = call.either(input)
    sizes = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if tuple(sizes) != x.shape:
        call.refuse(f"normalises over {tuple(sizes)}; the engine normalises over the whole sample, here {x.shape}")
    return _norm(call, Kind.layer_norm, x, weight, bias, eps, x.shape)


def group_norm(
    call: Call, input: object, num_groups: object, weight: object = None, bias: object = None, eps: object = 1e-5
) -> Value:
    x = call.either(input)
    groups = call.whole("num_groups", num_groups)
    if groups < 1 or x.shape[0] % groups:
        call.refuse(f"does not take samples of shape {x.shape}: it has {groups} groups")
    return _norm(call, Kind.group_norm, x, weight, bias, eps, x.shape[:1], groups=groups)


def _norm(
    call: Call, kind: Kind, x: Value, weight: object, bias: object, eps: object, shape: Shape, **fields: Any
) -> Value:
    weights = call.affine(weight, bias, shape)
    affine = weights[0] is not None
    return call.layer(kind, (x,), x.shape, weights, number=call.number("eps", eps), bias=affine, **fields)


def activation(kind: Kind) -> Row:
    def row(call: Call, input: object, inplace: object = False) -> Value:
        return pointwise(call, kind, input, inplace)

    return row


def in_place(row: Row) -> Row:
    """The row of the function with an underscore."""

    def overwriting(call: Call, input: object, *args: object, **kwargs: object) -> object:
        call.overwrites(input)
        return row(call, input, *args, **kwargs)

    return overwriting


def pointwise(call: Call, kind: Kind, input: object, inplace: object, *numbers: float) -> Value:
    x = call.either(input)
    if call.flag("inplace", inplace):
        call.overwrites(x)
    number, number1 = (*numbers, 0.0, 0.0)[:2]
    return call.layer(kind, (x,), x.shape, number=number, number1=number1)


def leaky_relu(call: Call, input: object, negative_slope: object = 0.01, inplace: object = False) -> Value:
    return pointwise(call, Kind.leaky_relu, input, inplace, call.number("negative_slope", negative_slope))


def elu(call: Call, input: object, alpha: object = 1.0, inplace: object = False) -> Value:
    return pointwise(call, Kind.elu, input, inplace, call.number("alpha", alpha))


def softplus(call: Call, input: object, beta: object = 1, threshold: object = 20) -> Value:
    numbers = call.number("beta", beta), call.number("threshold", threshold)
    return pointwise(call, Kind.softplus, input, False, *numbers)


def gelu(call: Call, input: object, approximate: object = "none") -> Value:
    kinds = {"none": Kind.gelu, "tanh": Kind.gelu_tanh}
    if not isinstance(approximate, str) or approximate not in kinds:
        call.refuse(f"has approximate={approximate!r}, expected 'none' or 'tanh'")
    return pointwise(call, kinds[approximate], input, False)


def dropout(call: Call, input: object, p: object = 0.5, training: object = True, inplace: object = False) -> Value:
    x = call.tensor(input)
    if call.flag("training", training) and call.number("p", p) != 0:
        call.refuse("is active: random outputs go by torch")
    return x


def identity(call: Call, input: object) -> Value:
    return call.tensor(input)


def add(call: Call, input: object, other: object, alpha: object = 1) -> object:
    if type(input) is int and type(other) is int:
        return input + other
    if not isinstance(input, Value) or not isinstance(other, Value):
        call.refuse("adds something else than the outputs of two layers")
    call.only("alpha", alpha, 1)
    x, y = call.either(input), call.either(other)
    if x.shape != y.shape:
        call.refuse(f"adds samples of shapes {x.shape} and {y.shape}; the engine adds equal ones")
    return call.layer(Kind.add, (x, y), x.shape)


def add_in_place(call: Call, input: object, other: object, alpha: object = 1) -> object:
    if isinstance(input, Value):
        call.overwrites(input)
    return add(call, input, other, alpha)
