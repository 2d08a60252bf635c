"""inner_update: values against extended precision, which path runs, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metafast as mf
from metafast.ops import inner_update
from tests.backends import (
    OperatorsSeen,
    device_of,
    in_every_order,
    native,
    on_backends,
    on_dtypes,
    poisoned,
    random,
    rounding_of,
    wide,
)

Rate = float | Tensor
ONE = torch.ops.metafast.inner_update.default
LIST = torch.ops.metafast.inner_update.list


def check(updated: Tensor, params: Tensor, grads: Tensor, lr: Rate) -> None:
    """Each element within the error that four roundings (scale, two products, difference) can add up to."""
    assert updated.shape == params.shape and updated.dtype == params.dtype and updated.device == params.device
    assert updated.is_contiguous()
    step = (wide(lr) if isinstance(lr, Tensor) else np.longdouble(lr)) * wide(grads)
    error = np.abs(wide(updated) - (wide(params) - step))
    bound = 1.01 * rounding_of(params.dtype) * (np.abs(wide(params)) + 4 * np.abs(step))
    assert (error <= bound).all(), f"{params.shape}: {error.max()} of {bound.max()}"


def run(backend: str, params: Any, grads: Any, lr: Any) -> Any:
    """The update on a backend, into poisoned memory; it must leave its inputs alone."""
    tensors = [t for x in (params, grads, lr) for t in ([x] if isinstance(x, Tensor) else x if type(x) is list else [])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    with poisoned(), mf.use_backend(backend):
        updated = in_every_order(backend, lambda: inner_update(params, grads, lr))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))
    outputs = [updated] if isinstance(updated, Tensor) else updated
    memory = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    assert not memory & {t.untyped_storage().data_ptr() for t in outputs if t.numel()}
    return updated


# A vector holds 2 to 16 numbers; the compiler takes up to four at a time.
WIDTHS = (2, 4, 8, 16, 32, 64)
SIZES = [(1, 1), (7, 1), (1, 13), (5, 8191), *((3, w + d) for w in WIDTHS for d in (-1, 0, 1))]
RATES: dict[str, Callable[[int, int], Rate | tuple[int, ...]]] = {
    "number": lambda t, p: 0.37,
    "integer": lambda t, p: 2,
    "zero": lambda t, p: 0.0,
    "negative": lambda t, p: -0.1,
    "()": lambda t, p: (),
    "(1,)": lambda t, p: (1,),
    "(P,)": lambda t, p: (p,),
    "(1, P)": lambda t, p: (1, p),
    "(T, 1)": lambda t, p: (t, 1),
    "(T, P)": lambda t, p: (t, p),
}


@on_backends
@on_dtypes
@pytest.mark.parametrize("rate", RATES)
def test_values_for_each_form_of_the_rate(backend: str, dtype: torch.dtype, rate: str) -> None:
    torch.manual_seed(0)
    where = {"dtype": dtype, "device": device_of(backend)}
    for tasks, size in SIZES:
        params, grads = random(tasks, size, **where), random(tasks, size, **where)
        form = RATES[rate](tasks, size)
        lr = random(*form, **where) if isinstance(form, tuple) else form
        check(run(backend, params, grads, lr), params, grads, lr)


@on_backends
@on_dtypes
def test_layers_and_rates_of_several_dimensions(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    where = {"dtype": dtype, "device": device_of(backend)}
    cases: dict[tuple[int, ...], list[tuple[int, ...]]] = {
        (5,): [(), (1,), (5,)],
        (4, 3, 5): [(), (5,), (3, 5), (3, 1), (1, 5), (1, 3, 5), (4, 1, 1), (4, 3, 1), (4, 1, 5), (1, 3, 1), (4, 3, 5)],
        # Dimensions of one length: which one a rate belongs to is not told by its length.
        (3, 3): [(3,), (3, 1), (1, 3), (3, 3)],
        (3, 3, 3): [(3,), (3, 1), (3, 3), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1)],
        (1, 2, 3): [(1, 1, 1), (2, 1), (1, 2, 3)],
        (2, 8, 1, 3, 3): [(8, 1, 1, 1), (2, 1, 1, 1, 1), (8, 1, 3, 3)],
    }
    for shape, rates in cases.items():
        params, grads = random(*shape, **where), random(*shape, **where)
        for lr in (0.3, *(random(*form, **where) for form in rates)):
            check(run(backend, params, grads, lr), params, grads, lr)


@on_backends
@on_dtypes
def test_memory_of_any_strides(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    where = {"dtype": dtype, "device": device_of(backend)}
    plain = random(6, 9, **where)
    views = {
        "transposed": random(9, 6, **where).t(),
        "expanded over tasks": random(9, **where).expand(6, 9),
        "expanded over parameters": random(6, 1, **where).expand(6, 9),
        "every other column": random(6, 18, **where)[:, 1::2],
        "an inner block": random(8, 12, **where)[1:7, 2:11],
        "channels last": random(2, 3, 3, 9, **where).to(memory_format=torch.channels_last).reshape(6, 27)[:, ::3],
    }
    for view in views.values():
        check(run(backend, view, plain, 0.3), view, plain, 0.3)
        check(run(backend, plain, view, 0.3), plain, view, 0.3)
        check(run(backend, view, view, view), view, view, view)
    for lr in (views["transposed"][:1], views["every other column"][2], views["an inner block"][:, 3:4]):
        check(run(backend, plain, plain, lr), plain, plain, lr)


@on_backends
@on_dtypes
def test_lists(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    where = {"dtype": dtype, "device": device_of(backend)}
    shapes = [(3, 4, 5), (3, 4), (3, 1), (3,)]
    params, grads = [random(*s, **where) for s in shapes], [random(*s, **where) for s in shapes]
    scalar = random(**where)
    each = [random(4, 1, **where), random(3, 4, **where), random(1, **where), random(3, **where)]
    mixed = [0.1, each[1], 0.2, scalar]
    for lr in (0.3, scalar, each, [0.1, 0.2, 0.3, 0.4], mixed):
        updated = run(backend, params, grads, lr)
        assert type(updated) is list and len(updated) == len(shapes)
        for u, p, g, rate in zip(updated, params, grads, lr if type(lr) is list else [lr] * len(shapes)):
            check(u, p, g, rate)
    [alone] = run(backend, (params[0],), (grads[0],), (each[0],))
    check(alone, params[0], grads[0], each[0])


@on_backends
def test_nothing_to_update(backend: str) -> None:
    for shape in ((0, 3), (3, 0), (0,), (2, 0, 4)):
        empty = torch.zeros(shape, device=device_of(backend))
        for lr in (0.1, empty, empty.new_ones(())):
            assert run(backend, empty, empty, lr).shape == shape


@native
@on_dtypes
@pytest.mark.parametrize("rate", ["number", "(P,)", "(T, 1)", "(T, P)"])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, rate: str) -> None:
    torch.manual_seed(0)
    for tasks, size in ((1, 32769), (5, 50021), (70001, 3), (1, 4 * 32768)):
        form = RATES[rate](tasks, size)
        params, grads = random(tasks, size, dtype=dtype), random(tasks, size, dtype=dtype)
        lr = random(*form, dtype=dtype) if isinstance(form, tuple) else form
        torch.set_num_threads(1)
        alone = run("cpu", params, grads, lr)
        check(alone, params, grads, lr)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(run("cpu", params, grads, lr), alone)


@on_backends
def test_which_path_runs(backend: str) -> None:
    x = torch.ones(2, 3, device=device_of(backend))
    with mf.use_backend(backend), OperatorsSeen() as recorder:
        inner_update(x, x, 0.1)
        inner_update([x, x], [x, x], 0.1)
    assert (ONE in recorder.seen, LIST in recorder.seen) == (backend != "torch",) * 2
    if backend == "cpu":
        # torch counts the twin's registration as no kernel for the key.
        assert all(torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CPU") for op in (ONE, LIST))


X, Y = torch.ones(2, 3), torch.ones(3, 2)
BAD: list[tuple[type[Exception], str, Any, Any, Any]] = [
    (TypeError, "params: expected a tensor", 1.0, X, 0.1),
    (TypeError, "params: expected a tensor", {"w": X}, X, 0.1),
    (TypeError, "params: expected a floating tensor", X.long(), X.long(), 0.1),
    (TypeError, "params: expected a floating tensor", torch.tensor(1.0), torch.tensor(1.0), 0.1),
    (TypeError, "grads: expected a tensor", X, None, 0.1),
    (TypeError, "grads: expected a tensor", X, [X], 0.1),
    (ValueError, r"grads: expected shape \(2, 3\)", X, Y, 0.1),
    (TypeError, "grads: expected dtype torch.float32", X, X.double(), 0.1),
    (TypeError, "grads: expected dtype torch.float32", X, X.int(), 0.1),
    (ValueError, "grads: expected device cpu", X, X.to("meta"), 0.1),
    (TypeError, "lr: expected a finite number", X, X, "0.1"),
    (TypeError, "lr: expected a finite number", X, X, True),
    (TypeError, "lr: expected a finite number", X, X, [0.1]),
    (ValueError, "lr: expected a finite number", X, X, float("nan")),
    (ValueError, "lr: expected a finite number", X, X, float("inf")),
    (ValueError, r"lr: expected a shape that broadcasts to \(2, 3\)", X, X, torch.ones(2)),
    (ValueError, r"lr: expected a shape that broadcasts to \(2, 3\)", X, X, torch.ones(1, 2, 3)),
    (TypeError, "lr: expected dtype torch.float32", X, X, torch.ones(3).double()),
    (TypeError, "lr: expected dtype torch.float32", X, X, torch.ones(3).long()),
    (ValueError, "lr: expected device cpu", X, X, torch.ones((), device="meta")),
    (ValueError, "params: expected at least one tensor", [], [], 0.1),
    (TypeError, "grads: expected a tensor or a list", [X], X, 0.1),
    (ValueError, "grads: expected 2 tensors", [X, X], [X], 0.1),
    (ValueError, "lr: expected one rate or 2", [X, X], [X, X], [0.1]),
    (TypeError, r"lr\[1\]: expected a finite number", [X, X], [X, X], [0.1, None]),
    (ValueError, r"lr\[1\]: expected a shape", [X, Y], [X, Y], [torch.ones(3), torch.ones(3)]),
    (ValueError, r"lr: expected a shape that broadcasts to \(3, 2\)", [X, Y], [X, Y], torch.ones(3)),
    (TypeError, r"params\[1\]: expected a tensor", [X, 1.0], [X, X], 0.1),
    (TypeError, r"params\[1\]: expected dtype and device of params\[0\]", [X, X.double()], [X, X.double()], 0.1),
    (ValueError, r"grads\[1\]: expected shape", [X, X], [X, Y], 0.1),
    (TypeError, r"grads\[0\]: expected dtype", [X, X], [X.double(), X], 0.1),
]


@on_backends
@pytest.mark.parametrize(("error", "message", "params", "grads", "lr"), BAD)
def test_bad_input(backend: str, error: type[Exception], message: str, params: Any, grads: Any, lr: Any) -> None:
    with mf.use_backend(backend), pytest.raises(error, match=f"^{message}"):
        inner_update(params, grads, lr)


@native
def test_the_operators_refuse_what_would_read_past_the_end() -> None:
    for error, name, arguments in (
        (ValueError, "params", (torch.tensor(1.0), torch.tensor(1.0), None, 1.0)),
        (ValueError, "grads", (X, X[:1], None, 1.0)),
        (TypeError, "grads", (X, X.double(), None, 1.0)),
        (ValueError, "lr", (X, X, torch.ones(2), 1.0)),
        (TypeError, "lr", (X, X, torch.ones(3).double(), 1.0)),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            ONE(*arguments)
    for name, lists in (
        ("grads", ([X, X], [X], [], [1.0, 1.0])),
        ("scale", ([X, X], [X, X], [], [1.0])),
        ("lr", ([X, X], [X, X], [X], [1.0, 1.0])),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            LIST(*lists)
    with pytest.raises(NotImplementedError, match="Half"):
        ONE(X.half(), X.half(), None, 1.0)


def test_other_dtypes_and_devices_go_by_the_twin() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        updated = inner_update(X.to(dtype), X.to(dtype), 0.25)
        assert updated.dtype == dtype and torch.equal(updated.float(), torch.full((2, 3), 0.75))
    abstract = torch.empty(2, 3, device="meta")
    assert inner_update(abstract, abstract, 0.1).device.type == "meta"
    assert ONE(abstract, abstract, None, 1.0).shape == (2, 3)
