"""inner_update under autograd, torch.func, torch.compile and opcheck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import metafast as mf
from metafast.ops import inner_update
from tests.backends import OperatorsSeen, device_of, native, on_backends, on_dtypes, on_kernels, random

ONE = torch.ops.metafast.inner_update.default
LIST = torch.ops.metafast.inner_update.list
# torch's own forward mode compiles its decompositions with a deprecated function of torch's.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@on_backends
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
def test_derivatives(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [random(*s, device=device_of(backend)).requires_grad_() for s in ((2, 3), (2, 3), shape)]
    with mf.use_backend(backend):
        assert gradcheck(inner_update, inputs)
        assert gradgradcheck(inner_update, inputs)
        assert gradcheck(lambda p, g: inner_update(p, g, 0.7), inputs[:2])
        assert gradgradcheck(lambda p, g: inner_update(p, g, 0.7), inputs[:2])


@on_kernels
def test_derivatives_of_the_operators_with_a_rate_and_a_scale(backend: str) -> None:
    """The public function passes one or the other."""
    torch.manual_seed(0)
    inputs = [random(*s, device=device_of(backend)).requires_grad_() for s in ((2, 3), (2, 3), (3,))]
    for operator in (lambda p, g, lr: ONE(p, g, lr, 0.7), lambda p, g, lr: LIST([p], [g], [lr], [0.7])[0]):
        with mf.use_backend(backend):
            assert torch.allclose(operator(*inputs), inputs[0] - 0.7 * inputs[2] * inputs[1], rtol=1e-14, atol=1e-14)
            assert gradcheck(operator, inputs)
            assert gradgradcheck(operator, inputs)


@on_backends
def test_derivatives_of_lists(backend: str) -> None:
    torch.manual_seed(0)

    def update(p0: Tensor, p1: Tensor, g0: Tensor, g1: Tensor, *lr: Tensor) -> tuple[Tensor, ...]:
        rates: Any = {0: 0.7, 1: lr[0] if lr else None, 2: list(lr)}[len(lr)]
        return tuple(inner_update([p0, p1], [g0, g1], rates))

    def mixed(p0: Tensor, p1: Tensor, g0: Tensor, g1: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        return tuple(inner_update([p0, p1], [g0, g1], [0.2, lr]))

    layers = ((2, 3), (2, 1, 2), (2, 3), (2, 1, 2))
    for function, rates in ((update, ()), (update, ((),)), (update, ((3,), (2, 1, 2))), (mixed, ((2,),))):
        inputs = [random(*s, device=device_of(backend)).requires_grad_() for s in (*layers, *rates)]
        with mf.use_backend(backend):
            assert gradcheck(function, inputs)
            assert gradgradcheck(function, inputs)


@on_backends
@on_dtypes
def test_gradients_of_only_what_asks_for_them(backend: str, dtype: torch.dtype) -> None:
    """In float32 too, where gradcheck is blind; with the list form's outputs not all used."""
    torch.manual_seed(0)
    where = {"dtype": dtype, "device": device_of(backend)}
    for wanted in range(1, 8):
        p, g, lr = (
            random(*s, **where).requires_grad_(bool(wanted & 1 << i)) for i, s in enumerate(((2, 3),) * 2 + ((3,),))
        )
        weight = random(2, 3, **where)
        expected = {p: weight, g: -lr * weight, lr: (-g * weight).sum(0)}
        with mf.use_backend(backend):
            results = [inner_update(p, g, lr), inner_update([p, p.detach()], [g, g.detach()], [lr, lr.detach()])[0]]
        for updated in results:
            leaves = [t for t in (p, g, lr) if t.requires_grad]
            for of, found in zip(leaves, torch.autograd.grad(updated, leaves, weight)):
                assert found.shape == of.shape and torch.allclose(found, expected[of])
    with torch.no_grad(), mf.use_backend(backend):
        assert not inner_update(p, g, lr).requires_grad


# torch 2.14 itself looks at the gradient of copies, and hides the warning but for where it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@on_kernels
def test_opcheck(backend: str) -> None:
    torch.manual_seed(0)

    def to(*tensors: Tensor, requires_grad: bool = False) -> list[Tensor]:
        return [t.detach().to(device_of(backend)).requires_grad_(requires_grad) for t in tensors]

    def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
        with mf.use_backend(backend):
            torch.library.opcheck(operator, arguments)

    p, g, q, h = random(3, 5), random(3, 5), random(3, 2, 2), random(3, 2, 2)
    for wants in (False, True):
        for lr in (None, random(), random(5), random(3, 1), random(3, 5)):
            arguments = to(p, g, *([] if lr is None else [lr]), requires_grad=wants)
            opcheck(ONE, (*arguments[:2], *(arguments[2:] or [None]), 0.7))
        for rates in ([], [random(3, 1), random(2, 1)]):
            lists = (to(p, q, requires_grad=wants), to(g, h, requires_grad=wants), to(*rates, requires_grad=wants))
            opcheck(LIST, (*lists, [0.7, 1.0]))
    strided, other = to(random(5, 3), random(5, 3))
    opcheck(ONE, (strided.t(), other.t(), None, 0.7))
    opcheck(LIST, ([strided.t()], [other.t()], [], [0.7]))


@on_backends
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(backend: str, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    device = device_of(backend)

    def update(p: Tensor, g: Tensor, lr: Tensor) -> list[Tensor]:
        return [inner_update(p, g, lr), *inner_update([p, g], [g, p], [lr, 0.2])]

    torch._dynamo.reset()
    with mf.use_backend(backend):
        compiled = torch.compile(update, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for tasks in (3, 4):
            inputs = [random(tasks, 5, device=device), random(tasks, 5, device=device), random(5, device=device)]
            found, wanted = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
            outputs, plain = compiled(*found), update(*wanted)
            for output, expected in zip(outputs, plain):
                assert torch.allclose(output, expected, rtol=1e-14, atol=1e-14)
            for results in (outputs, plain):
                sum((i + 1) * r.square().sum() for i, r in enumerate(results)).backward()
            for one, other in zip(found, wanted):
                assert torch.allclose(one.grad, other.grad, rtol=1e-13, atol=1e-13)


@native
def test_compiled_graphs_keep_the_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(inner_update, fullgraph=True, backend=record)(torch.ones(2, 3), torch.ones(2, 3), 0.1)
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"].count(
        torch.ops.metafast.inner_update
    ) == 1


@on_backends
def test_vmap(backend: str) -> None:
    torch.manual_seed(0)
    p, g = random(4, 3, 5, device=device_of(backend)), random(4, 3, 5, device=device_of(backend))
    shared, rate = random(3, 5, device=device_of(backend)), random(4, device=device_of(backend))
    cases: list[tuple[tuple[int | None, ...], tuple[Tensor, ...], Tensor]] = [
        ((0, 0, None), (p, g, shared), p - shared * g),
        ((1, 1, 0), (p.transpose(0, 1), g.transpose(0, 1), rate), p - rate.view(4, 1, 1) * g),
        ((0, None, None), (p, shared, shared[:, :1]), p - shared[:, :1] * shared),
        ((None, None, 0), (shared, shared, rate), shared - rate.view(4, 1, 1) * shared),
        ((0, -1, 0), (p, g.movedim(0, -1), p[:, 0]), p - p[:, :1] * g),
    ]
    with mf.use_backend(backend):
        for in_dims, arguments, wanted in cases:
            assert torch.allclose(vmap(inner_update, in_dims)(*arguments), wanted, rtol=1e-13, atol=1e-14)
            two = vmap(lambda p, g, lr: inner_update([p, shared], [g, shared], [lr, 0.5]), in_dims)(*arguments)
            assert torch.allclose(two[0], wanted, rtol=1e-13, atol=1e-14)
            assert torch.allclose(two[1], shared.expand(4, 3, 5) / 2, rtol=1e-13, atol=1e-14)
        twice = vmap(vmap(lambda p, g: inner_update(p, g, 0.3)), in_dims=(0, None))(p, g[0])
        assert torch.allclose(twice, p - 0.3 * g[0], rtol=1e-13, atol=1e-14)
        # Ordinary autograd around it.
        leaves = [p.clone().requires_grad_(), g.clone().requires_grad_(), rate.clone().requires_grad_()]
        vmap(inner_update)(*leaves).square().sum().backward()
    twice_updated = 2 * (p - rate.view(4, 1, 1) * g)
    for found, wanted in zip(
        leaves, (twice_updated, -rate.view(4, 1, 1) * twice_updated, -(g * twice_updated).sum((1, 2)))
    ):
        assert torch.allclose(found.grad, wanted, rtol=1e-12, atol=1e-12)


@native
def test_vmap_runs_the_kernels() -> None:
    x = torch.ones(4, 2, 3)
    with OperatorsSeen() as recorder:
        vmap(vmap(lambda p: inner_update(p, p, 0.3)))(x)
        vmap(lambda p: inner_update([p], [p], 0.3)[0])(x)
    assert recorder.seen.count(ONE) == 2


@forward_mode
@pytest.mark.parametrize("as_list", [False, True])
def test_functional_derivatives(as_list: bool) -> None:
    """They go by the twin, whichever transform is outermost."""
    torch.manual_seed(0)
    p, g, lr, tangent = random(3, 5), random(3, 5), random(3, 5), random(3, 5)

    def update(p: Tensor, g: Tensor = g, lr: Tensor = lr) -> Tensor:
        return inner_update([p], [g], [lr])[0] if as_list else inner_update(p, g, lr)

    def close(found: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(found, wanted, rtol=1e-13, atol=1e-14)

    wanted = 2 * (p - lr * g)
    assert close(grad(lambda p: update(p).square().sum())(p), wanted)
    assert close(grad(lambda lr: update(p, g, lr).square().sum())(lr), -g * wanted)
    assert close(grad(lambda p: vmap(update)(p, g, lr).square().sum())(p), wanted)
    assert close(vmap(grad(lambda p, g, lr: update(p, g, lr).square().sum()))(p, g, lr), wanted)
    assert close(jvp(lambda lr: update(p, g, lr), (lr,), (tangent,))[1], -tangent * g)
    assert close(jvp(lambda g: vmap(update)(p, g, lr), (g,), (tangent,))[1], -lr * tangent)
    assert close(
        vmap(lambda g, t: jvp(lambda g: update(p, g), (g,), (t,))[1])(g.expand(2, 3, 5), tangent.expand(2, 3, 5))[1],
        -lr * tangent,
    )
    second = hessian(lambda lr: update(p, g, lr).square().sum())(lr)
    assert close(second.reshape(15, 15), torch.diag((2 * g * g).reshape(-1)))
    with forward_ad.dual_level():
        dual = update(p, forward_ad.make_dual(g, tangent))
        assert close(forward_ad.unpack_dual(dual).tangent, -lr * tangent)
    torch._dynamo.reset()
    for transform in (lambda p: grad(lambda p: update(p).square().sum())(p), lambda p: 2 * vmap(update)(p, g, lr)):
        assert close(torch.compile(transform, fullgraph=True, backend="aot_eager")(p), wanted)
