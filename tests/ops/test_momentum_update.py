"""momentum_update: values against extended precision, derivatives, transforms, which path runs, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import metafast as mf
from metafast.ops import momentum_update
from tests.backends import (
    OperatorsSeen,
    device_of,
    in_every_order,
    native,
    on_backends,
    on_dtypes,
    on_kernels,
    poisoned,
    random,
    rounding_of,
    wide,
)

OPERATOR = torch.ops.metafast.momentum_update.default
LR, MOMENTUM = 0.37, 0.9


def run(
    backend: str, params: Tensor, grads: Tensor, velocity: Tensor | None, lr: float = LR, momentum: float = MOMENTUM
) -> list[Tensor]:
    """The step on a backend, into poisoned memory; it must leave its inputs alone, and share none of their memory."""
    inputs = [t for t in (params, grads, velocity) if t is not None]
    before = [t.clone() for t in inputs]
    with poisoned(), mf.use_backend(backend):
        found = in_every_order(backend, lambda: list(momentum_update(params, grads, velocity, lr, momentum)))
    assert all(torch.equal(t, b) for t, b in zip(inputs, before))
    places = [t.untyped_storage().data_ptr() for t in found if t.numel()]
    assert len(set(places)) == len(places)
    assert not {t.untyped_storage().data_ptr() for t in inputs if t.numel()} & set(places)
    return found


def check(
    found: list[Tensor],
    params: Tensor,
    grads: Tensor,
    velocity: Tensor | None,
    lr: float = LR,
    momentum: float = MOMENTUM,
) -> None:
    """Each element within what a number's, a product's and a sum's rounding can add up to, twice for ``updated``."""
    updated, after = found
    for result in found:
        assert (result.shape, result.dtype, result.device) == (params.shape, params.dtype, params.device)
        assert result.is_contiguous()
    kept = np.longdouble(momentum) * (0 if velocity is None else wide(velocity))
    exact, size = kept + wide(grads), np.abs(kept) + np.abs(wide(grads))
    rounding = 1.01 * rounding_of(params.dtype)
    error = np.abs(wide(after) - exact)
    assert (error <= 3 * rounding * size).all(), f"velocity {params.shape}: {error.max()}"
    step = np.longdouble(lr)
    error = np.abs(wide(updated) - (wide(params) - step * exact))
    bound = rounding * (np.abs(wide(params)) + 6 * np.abs(step) * size)
    assert (error <= bound).all(), f"updated {params.shape}: {error.max()}"


# A vector holds 2 to 16 numbers, of which the compiler takes up to four at a time; a block of the GPU has 256 threads.
SIZES = [(1, 1), (7, 1), (1, 13), (5, 8191), *((3, w + d) for w in (2, 4, 8, 16, 32, 64, 256) for d in (-1, 0, 1))]


@on_backends
@on_dtypes
@pytest.mark.parametrize("first", [False, True])
def test_values(backend: str, dtype: torch.dtype, first: bool) -> None:
    torch.manual_seed(0)
    where: dict[str, Any] = {"dtype": dtype, "device": device_of(backend)}
    for shape in (*SIZES, (5,), (2, 3, 4), (2, 8, 1, 3, 3)):
        params, grads, velocity = (random(*shape, **where) for _ in range(3))
        arguments = (params, grads, None if first else velocity)
        for lr, momentum in ((LR, MOMENTUM), (-2, 1), (0.0, 0.0)):
            check(run(backend, *arguments, lr, momentum), *arguments, lr, momentum)


@on_backends
@on_dtypes
def test_memory_of_any_strides(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    where: dict[str, Any] = {"dtype": dtype, "device": device_of(backend)}
    plain, other = random(6, 9, **where), random(6, 9, **where)
    views = {
        "transposed": random(9, 6, **where).t(),
        "expanded over tasks": random(9, **where).expand(6, 9),
        "every other column": random(6, 18, **where)[:, 1::2],
        "an inner block": random(8, 12, **where)[1:7, 2:11],
    }
    for view in views.values():
        for arguments in ((view, plain, other), (plain, view, other), (plain, other, view), (view, view, view)):
            check(run(backend, *arguments), *arguments)
        check(run(backend, plain, view, None), plain, view, None)


@on_backends
def test_nothing_to_update(backend: str) -> None:
    for shape in ((0, 3), (3, 0), (0,)):
        empty = torch.zeros(shape, device=device_of(backend))
        assert [t.shape for t in run(backend, empty, empty, empty)] == [shape] * 2


@native
@on_dtypes
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((1, 32769), (5, 50021), (70001, 3)):
        arguments = [random(*shape, dtype=dtype) for _ in range(3)]
        torch.set_num_threads(1)
        alone = run("cpu", *arguments)
        check(alone, *arguments)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run("cpu", *arguments), alone))


@on_backends
def test_derivatives(backend: str) -> None:
    torch.manual_seed(0)
    inputs = [random(2, 3, device=device_of(backend)).requires_grad_() for _ in range(3)]
    with mf.use_backend(backend):
        for function, tensors in (
            (lambda p, g, v: momentum_update(p, g, v, LR, MOMENTUM), inputs),
            (lambda p, g: momentum_update(p, g, None, LR, MOMENTUM), inputs[:2]),
            (lambda p, g, v: momentum_update(p, g, v, LR, MOMENTUM)[0], inputs),
            (lambda g, v: momentum_update(inputs[0].detach(), g, v, LR, MOMENTUM)[1], inputs[1:]),
        ):
            assert gradcheck(function, tensors)
            assert gradgradcheck(function, tensors)


@on_backends
@on_dtypes
def test_gradients_of_only_what_asks_for_them(backend: str, dtype: torch.dtype) -> None:
    """In float32 too, where gradcheck is blind."""
    torch.manual_seed(0)
    where: dict[str, Any] = {"dtype": dtype, "device": device_of(backend)}
    d_updated, d_after = random(2, 3, **where), random(2, 3, **where)
    for wanted in range(1, 8):
        tensors = [random(2, 3, **where).requires_grad_(bool(wanted & 1 << i)) for i in range(3)]
        along = d_after - LR * d_updated
        expected = [e for e, t in zip((d_updated, along, MOMENTUM * along), tensors) if t.requires_grad]
        with mf.use_backend(backend):
            results = momentum_update(tensors[0], tensors[1], tensors[2], LR, MOMENTUM)
        # The twin's velocity hangs on params in nothing at all.
        attached = [(r, d) for r, d in zip(results, (d_updated, d_after)) if r.requires_grad]
        outputs, cotangents = zip(*attached)
        found = torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], cotangents)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert one.shape == other.shape and torch.allclose(one, other)
    with torch.no_grad(), mf.use_backend(backend):
        assert not any(t.requires_grad for t in momentum_update(*tensors, LR, MOMENTUM))


# torch 2.14 itself looks at the gradient of copies, and hides the warning but for where it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@on_kernels
def test_opcheck(backend: str) -> None:
    torch.manual_seed(0)
    for wants in (False, True):
        p, g, v = (random(3, 5, device=device_of(backend)).requires_grad_(wants) for _ in range(3))
        strided = random(5, 3, device=device_of(backend)).t()
        for arguments in ((p, g, v, LR, MOMENTUM), (p, g, None, LR, MOMENTUM), (strided, g, strided, LR, MOMENTUM)):
            with mf.use_backend(backend):
                torch.library.opcheck(OPERATOR, arguments)


@on_backends
def test_compile(backend: str) -> None:
    torch.manual_seed(0)

    def steps(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        p, v = momentum_update(p, g, None, LR, MOMENTUM)
        return momentum_update(p, g * p, v, LR, MOMENTUM)

    torch._dynamo.reset()
    with mf.use_backend(backend):
        compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
        found, wanted = ([random(3, 5, device=device_of(backend)) for _ in range(2)] for _ in range(2))
        for one, other in zip(found, wanted):
            other.copy_(one)
            one.requires_grad_(), other.requires_grad_()
        outputs, plain = compiled(*found), steps(*wanted)
        for results in (outputs, plain):
            sum((i + 1) * r.square().sum() for i, r in enumerate(results)).backward()
    for one, other in (*zip(outputs, plain), *((a.grad, b.grad) for a, b in zip(found, wanted))):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)


@on_backends
def test_vmap(backend: str) -> None:
    torch.manual_seed(0)
    p, g, v = (random(4, 3, 5, device=device_of(backend)) for _ in range(3))
    shared = random(3, 5, device=device_of(backend))

    def step(p: Tensor, g: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        return momentum_update(p, g, v, LR, MOMENTUM)

    cases: list[tuple[tuple[int | None, ...], tuple[Tensor, ...], Tensor, Tensor]] = [
        ((0, 0, 0), (p, g, v), p, MOMENTUM * v + g),
        ((None, 0, None), (shared, g, shared), shared, MOMENTUM * shared + g),
        ((1, -1, None), (p.transpose(0, 1), g.movedim(0, -1), shared), p, MOMENTUM * shared + g),
    ]
    with mf.use_backend(backend), OperatorsSeen() as recorder:
        for in_dims, arguments, params, after in cases:
            found = vmap(step, in_dims)(*arguments)
            assert torch.allclose(found[1], after, rtol=1e-13, atol=1e-14)
            assert torch.allclose(found[0], params - LR * after, rtol=1e-13, atol=1e-14)
        assert torch.allclose(vmap(lambda p, g: step(p, g, None)[0])(p, g), p - LR * g, rtol=1e-13, atol=1e-14)
        nested = vmap(vmap(step))(p, g, v)[0]
        assert torch.allclose(nested, p - LR * (MOMENTUM * v + g), rtol=1e-13, atol=1e-14)
    assert recorder.seen.count(OPERATOR) == (0 if backend == "torch" else 5)


# torch's own forward mode compiles its decompositions with a deprecated function of torch's.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_functional_derivatives() -> None:
    """They go by the twin, whichever transform is outermost."""
    torch.manual_seed(0)
    p, g, v, tangent = (random(3, 5) for _ in range(4))

    def updated(v: Tensor) -> Tensor:
        return momentum_update(p, g, v, LR, MOMENTUM)[0]

    def close(found: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(found, wanted, rtol=1e-13, atol=1e-14)

    wanted = -LR * MOMENTUM * 2 * (p - LR * (MOMENTUM * v + g))
    assert close(grad(lambda v: updated(v).square().sum())(v), wanted)
    assert close(jvp(updated, (v,), (tangent,))[1], -LR * MOMENTUM * tangent)
    with forward_ad.dual_level():
        dual = updated(forward_ad.make_dual(v, tangent))
        assert close(forward_ad.unpack_dual(dual).tangent, -LR * MOMENTUM * tangent)


@on_backends
def test_which_path_runs(backend: str) -> None:
    """The rule's too."""
    x = torch.ones(2, 3, device=device_of(backend))
    rule = mf.Momentum(LR, MOMENTUM)
    with mf.use_backend(backend), OperatorsSeen() as recorder:
        momentum_update(x, x, x, LR, MOMENTUM)
        rule.step(x, x, rule.init(x))
    assert recorder.seen.count(OPERATOR) == (0 if backend == "torch" else 2)
    if backend == "cpu":
        # torch counts the twin's registration as no kernel for the key.
        assert torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR._name, "CPU")


X = torch.ones(2, 3)
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, "params: expected a tensor", (1.0, X, X, 0.1, 0.9)),
    (TypeError, "params: expected a floating tensor", (X.long(), X.long(), None, 0.1, 0.9)),
    (TypeError, "params: expected a floating tensor", (X.sum(), X.sum(), None, 0.1, 0.9)),
    (TypeError, "grads: expected a tensor", (X, None, X, 0.1, 0.9)),
    (ValueError, r"grads: expected shape \(2, 3\)", (X, X.t(), X, 0.1, 0.9)),
    (TypeError, "grads: expected dtype torch.float32", (X, X.double(), X, 0.1, 0.9)),
    (TypeError, "grads: expected dtype torch.float32", (X, X.int(), X, 0.1, 0.9)),
    (ValueError, "grads: expected device cpu", (X, X.to("meta"), X, 0.1, 0.9)),
    (TypeError, "velocity: expected a tensor", (X, X, 0.0, 0.1, 0.9)),
    (ValueError, r"velocity: expected shape \(2, 3\)", (X, X, X[:1], 0.1, 0.9)),
    (TypeError, "velocity: expected dtype torch.float32", (X, X, X.double(), 0.1, 0.9)),
    (ValueError, "velocity: expected device cpu", (X, X, X.to("meta"), 0.1, 0.9)),
    (TypeError, "lr: expected a finite number", (X, X, X, "0.1", 0.9)),
    (TypeError, "lr: expected a finite number", (X, X, X, X, 0.9)),
    (ValueError, "lr: expected a finite number", (X, X, X, float("nan"), 0.9)),
    (TypeError, "momentum: expected a finite number", (X, X, X, 0.1, None)),
    (ValueError, "momentum: expected a finite number", (X, X, X, 0.1, float("inf"))),
]


@on_backends
@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_bad_input(backend: str, error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with mf.use_backend(backend), pytest.raises(error, match=f"^{message}"):
        momentum_update(*arguments)


@native
def test_the_operator_refuses_what_would_read_past_the_end() -> None:
    for error, name, arguments in (
        (ValueError, "grads", (X, X[:1], None)),
        (TypeError, "grads", (X, X.double(), None)),
        (ValueError, "velocity", (X, X, X[:1])),
        (TypeError, "velocity", (X, X, X.double())),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            OPERATOR(*arguments, LR, MOMENTUM)
    with pytest.raises(NotImplementedError, match="Half"):
        OPERATOR(X.half(), X.half(), None, LR, MOMENTUM)


def test_other_dtypes_and_devices_go_by_the_twin() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        updated, after = momentum_update(X.to(dtype), X.to(dtype), X.to(dtype), 0.25, 1.0)
        assert updated.dtype == dtype and torch.equal(updated.float(), X / 2) and torch.equal(after.float(), 2 * X)
    abstract = torch.empty(2, 3, device="meta")
    assert [t.device.type for t in momentum_update(abstract, abstract, None, 0.1, 0.9)] == ["meta"] * 2
    assert [t.shape for t in OPERATOR(abstract, abstract, None, 0.1, 0.9)] == [(2, 3)] * 2
