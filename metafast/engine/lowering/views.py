"""Rows of the lowering table that make no layer: reshapes, and what a forward reads of shapes to make them."""

from __future__ import annotations

from collections.abc import Callable

from metafast.engine.lowering.build import Value
from metafast.engine.lowering.call import Batch, Call


def flatten(call: Call, input: object, start_dim: object = 0, end_dim: object = -1) -> Value:
    start, end = call.whole("start_dim", start_dim), call.whole("end_dim", end_dim)
    return call.view(input, lambda t, n: t.flatten(start, end))


def unflatten(call: Call, input: object, dim: object, sizes: object) -> Value:
    at, shape = call.whole("dim", dim), _sizes(call, (sizes,))
    return call.view(input, lambda t, n: t.unflatten(at, _at(shape, n)))


def view(call: Call, input: object, *shape: object) -> Value:
    wanted = _sizes(call, shape)
    return call.view(input, lambda t, n: t.reshape(_at(wanted, n)))


def reshape(call: Call, input: object, *shape: object) -> Value:
    return view(call, input, *shape)


def unsqueeze(call: Call, input: object, dim: object) -> Value:
    at = call.whole("dim", dim)
    return call.view(input, lambda t, n: t.unsqueeze(at))


def squeeze(call: Call, input: object, dim: object) -> Value:
    at = call.whole("dim", dim)
    return call.view(input, lambda t, n: t.squeeze(at))


def _sizes(call: Call, shape: tuple[object, ...]) -> tuple[int | Batch, ...]:
    parts = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return tuple(p if isinstance(p, Batch) else call.whole("size", p) for p in parts)


def _at(shape: tuple[int | Batch, ...], n: int) -> list[int]:
    return [n if isinstance(part, Batch) else part for part in shape]


def size(call: Call, input: object, dim: object = None) -> object:
    shape = (Batch.N, *call.tensor(input).shape)
    return shape if dim is None else item(call, shape, dim)


def dim(call: Call, input: object) -> object:
    return 1 + len(call.tensor(input).shape)


def length(call: Call, input: object) -> object:
    call.tensor(input)
    return Batch.N


def attribute(call: Call, input: object, name: str) -> object:
    readers: dict[str, Callable[[Call, object], object]] = {"shape": size, "ndim": dim}
    if name not in readers:
        call.refuse(f"reads {name!r} of a tensor, which has no row in the lowering table")
    return readers[name](call, input)


def item(call: Call, input: object, at: object) -> object:
    if not isinstance(input, tuple):
        call.refuse("takes a part of a tensor, which has no row in the lowering table")
    try:
        return input[at]  # type: ignore[call-overload]
    except (IndexError, TypeError) as error:
        call.refuse(f"asks a shape for what it has not: {error}")


def arithmetic(function: Callable[[int, int], int]) -> Callable[..., object]:
    def row(call: Call, input: object, other: object) -> object:
        if type(input) is not int or type(other) is not int:
            call.refuse("has no row in the lowering table for tensors and for the number of samples")
        return function(input, other)

    return row
