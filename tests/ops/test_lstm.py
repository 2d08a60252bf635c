"""lstm_update: the kernel against the reference's equations, forward, backward and twice; and torch's own checks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import metafast as mf
from metafast.reference.lstm import lstm_step
from tests.backends import ON_CPU, device_of, in_every_order, on_dtypes, on_kernels, poisoned
from tests.backends import native as needs_kernels
from tests.nets import relative_error

BAR = 1e-10


def problem(
    coordinates: int,
    hidden: int,
    layers: int,
    dtype: torch.dtype = torch.float64,
    p: float = 10.0,
    device: str = "cpu",
) -> tuple[mf.LSTMOptimizer, Tensor, Tensor]:
    """An optimiser, gradients of all sizes (zero, tiny, large, either sign) and a state."""
    torch.manual_seed(hidden)
    optimizer = mf.LSTMOptimizer(hidden, layers, p).double()
    with torch.no_grad():
        for w in optimizer.weights:
            w.add_(0.1 * torch.randn_like(w))
    grads = torch.randn(coordinates, dtype=torch.float64) * 10.0 ** torch.randint(-8, 3, (coordinates,))
    grads[::7] = 0
    state = torch.randn(layers, 2, coordinates, hidden, dtype=torch.float64)
    return optimizer.to(device, dtype), grads.to(device, dtype), state.to(device, dtype)


# Around blocks of 32 and 64 coordinates; the last one is more than a GPU's shared memory holds, and 97 of 40 units are
# on the way back.
SIZES = [
    (1, 1, 1),
    (2, 3, 1),
    (31, 20, 2),
    (32, 16, 2),
    (33, 17, 3),
    (64, 2, 8),
    (65, 9, 1),
    (257, 20, 2),
    (1000, 5, 1),
    (97, 40, 2),
    (3, 101, 1),
]


def threads_of(backend: str) -> tuple[int, ...]:
    return (1, 3) if backend == "cpu" else (1,)


@on_kernels
@pytest.mark.parametrize(("coordinates", "hidden", "layers"), SIZES)
def test_three_steps_and_their_gradients(coordinates: int, hidden: int, layers: int, backend: str) -> None:
    optimizer, grads, state = problem(coordinates, hidden, layers, device=device_of(backend))
    weights = list(optimizer.weights)

    def three(step: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        g, s = grads.clone().requires_grad_(), state.clone().requires_grad_()
        carried, total = s, torch.zeros((), dtype=torch.float64, device=g.device)
        for k in range(3):
            update, carried = step(g * (k + 1), carried, weights, p=optimizer.p)
            total = total + (update * torch.arange(1, coordinates + 1, device=g.device)).sum()
        total = total + (carried**2).sum()
        return [update.detach(), carried.detach(), *torch.autograd.grad(total, [g, s, *weights])]

    for threads in threads_of(backend):
        torch.set_num_threads(threads)
        with mf.use_backend(backend):
            found = three(mf.ops.lstm_update)
        for mine, wanted in zip(found, three(lstm_step), strict=True):
            assert relative_error(mine, wanted) <= BAR


@on_kernels
def test_more_coordinates_than_a_launch_has_blocks_for(backend: str) -> None:
    """A GPU's blocks take several tiles of 64 then, on the way back already beyond 256 of them."""
    for coordinates, back in ((64 * 256 + 1, True), (64 * 1024 + 1, False)):
        optimizer, grads, state = problem(coordinates, 1, 1, device=device_of(backend))
        weights = list(optimizer.weights)
        results = []
        for step in (mf.ops.lstm_update, lstm_step):
            with mf.use_backend(backend):
                updates, carried = step(grads, state, weights, p=optimizer.p)
                total = updates.square().sum() + carried.square().sum()
                pulled = torch.autograd.grad(total, weights) if back else ()
            results.append([updates.detach(), carried.detach(), *pulled])
        for mine, wanted in zip(*results, strict=True):
            assert relative_error(mine, wanted) <= BAR


@on_kernels
@on_dtypes
@pytest.mark.parametrize(("coordinates", "hidden", "layers"), [(1, 1, 1), (65, 3, 2), (130, 5, 1), (3, 101, 1)])
def test_a_step_in_every_order_into_poisoned_memory(
    coordinates: int, hidden: int, layers: int, dtype: torch.dtype, backend: str
) -> None:
    optimizer, grads, state = problem(coordinates, hidden, layers, dtype, device=device_of(backend))
    weights = list(optimizer.weights)

    def step(by: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        g, s = grads.clone().requires_grad_(), state.clone().requires_grad_()
        updates, carried = by(g, s, weights, p=optimizer.p)
        total = updates.square().sum() + carried.square().sum()
        return [updates.detach(), carried.detach(), *torch.autograd.grad(total, [g, s, *weights])]

    with poisoned(), mf.use_backend(backend):
        found = in_every_order(backend, lambda: step(mf.ops.lstm_update))
    for mine, wanted in zip(found, step(lstm_step), strict=True):
        assert relative_error(mine, wanted) <= (BAR if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize(("coordinates", "hidden", "layers"), [(1, 1, 1), (33, 20, 2), (257, 7, 3)])
def test_all_steps_at_once(coordinates: int, hidden: int, layers: int, from_zero: bool, backend: str) -> None:
    """(K, N) gradients are K calls; a state of zeros, from which a step has less to do, has its gradient too."""
    optimizer, first, state = problem(coordinates, hidden, layers)
    grads = torch.stack([first, -first.flip(0), 0.3 * first, first])
    if from_zero:
        state = torch.zeros_like(state)
    weights = list(optimizer.weights)
    results = []
    for at_once in (True, False):
        g, s = grads.clone().requires_grad_(), state.clone().requires_grad_()
        if at_once:
            with mf.use_backend(backend):
                updates, carried = mf.ops.lstm_update(g, s, weights, p=optimizer.p)
        else:
            carried, rows = s, []
            for row in g:
                update, carried = lstm_step(row, carried, weights, optimizer.p)
                rows.append(update)
            updates = torch.stack(rows)
        total = (updates * torch.arange(1, grads.numel() + 1).view_as(grads)).sum() + (carried**2).sum()
        results.append([updates.detach(), carried.detach(), *torch.autograd.grad(total, [g, s, *weights])])
    for found, wanted in zip(*results):
        assert relative_error(found, wanted) <= BAR


@needs_kernels
def test_all_steps_at_once_as_an_operator() -> None:
    optimizer, first, state = problem(5, 3, 2)
    grads = torch.stack([first, 2 * first]).requires_grad_()
    arguments = (grads, state.requires_grad_(), list(optimizer.weights), optimizer.p)
    torch.library.opcheck(torch.ops.metafast.lstm_update.default, arguments)
    batch = torch.stack([grads, -grads, 0.5 * grads], dim=1).detach()  # (K, B, N)
    updates, carried = torch.vmap(
        lambda g: mf.ops.lstm_update(g, state, list(optimizer.weights), p=optimizer.p), in_dims=1
    )(batch)
    for b in range(3):
        one = mf.ops.lstm_update(batch[:, b], state, list(optimizer.weights), p=optimizer.p)
        assert torch.equal(updates[b], one[0]) and torch.equal(carried[b], one[1])
    with pytest.raises(ValueError, match=r"^grads: expected a floating tensor of shape \(N,\) or \(K, N\)"):
        mf.ops.lstm_update(grads[:0], state, list(optimizer.weights))


@needs_kernels
def test_the_same_bits_for_any_number_of_threads() -> None:
    optimizer, grads, state = problem(5000, 20, 2, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        updates, carried = mf.ops.lstm_update(grads, state, list(optimizer.weights))
        found.append([updates, *torch.autograd.grad(updates.sum() + carried.sum(), list(optimizer.weights))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@on_kernels
def test_float32_errs_at_most_twice_as_much_as_torch(backend: str) -> None:
    optimizer, grads, state = problem(500, 20, 2, device=device_of(backend))
    results = {}
    for name, dtype, by in (
        ("exact", torch.float64, "torch"),
        ("torch", torch.float32, "torch"),
        ("native", torch.float32, backend),
    ):
        o, g, s = optimizer.to(dtype), grads.to(dtype), state.to(dtype)
        with mf.use_backend(by):
            updates, carried = mf.ops.lstm_update(g, s, list(o.weights))
            gradients = torch.autograd.grad(updates.sum() + carried.square().sum(), list(o.weights))
        results[name] = [t.detach().double() for t in (updates, carried, *gradients)]
    for exact, plain, found in zip(*(results[k] for k in ("exact", "torch", "native"))):
        assert relative_error(found, exact) <= 2 * relative_error(plain, exact) + 1e-6


@on_kernels
@pytest.mark.parametrize("which", ["updates", "state"])
def test_one_cotangent_alone(which: str, backend: str) -> None:
    optimizer, grads, state = problem(19, 4, 2, device=device_of(backend))
    weights = list(optimizer.weights)
    pulled = []
    for step in (mf.ops.lstm_update, lstm_step):
        with mf.use_backend(backend):
            updates, carried = step(grads, state, weights, p=10.0)
            total = updates.sum() if which == "updates" else carried[0].sum()
            pulled.append(torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True))
    for found, wanted in zip(*pulled):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@on_kernels
@pytest.mark.parametrize("steps", [1, 3])
def test_the_states_cotangent_is_made_where_it_is_wanted(steps: int, backend: str) -> None:
    """A state that requires no gradient gets none, and the others' are the same bits."""
    if steps > 1 and backend != "cpu":
        pytest.skip("several steps at once are the CPU's alone")
    optimizer, grads, state = problem(70, 5, 2, torch.float32, device=device_of(backend))
    weights = list(optimizer.weights)
    grads = (grads if steps == 1 else torch.stack([grads] * steps)).requires_grad_()
    pulled = []
    for leaf in (state.detach(), state.detach().requires_grad_()):
        with mf.use_backend(backend):
            updates, carried = mf.ops.lstm_update(grads, leaf, weights)
            (updates.square().sum() + carried.sum()).backward()
        assert (leaf.grad is not None) == leaf.requires_grad
        pulled.append([t.grad for t in (grads, *weights)])
        for t in (grads, *weights):
            t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*pulled))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_any_size(dtype: torch.dtype, backend: str) -> None:
    """The kernels' own logarithm, near 1, at the ends of the range, and of what is no number."""
    optimizer, _, _ = problem(1, 4, 1, dtype, device=device_of(backend))
    ends = torch.finfo(dtype)
    sizes = [0.0, ends.tiny / 8, ends.tiny, 1e-35, 1e-5, 1 - 2 * ends.eps, 1.0, 1 + ends.eps, 1.4142, ends.max]
    grads = torch.tensor([*sizes, math.inf, math.nan, *(-s for s in sizes)], dtype=dtype, device=device_of(backend))
    state = optimizer.init(len(grads))
    found, wanted = [], []
    for to, by in ((found, backend), (wanted, "torch")):
        for p in (10.0, 80.0):
            with mf.use_backend(by):
                to += mf.ops.lstm_update(grads, state, list(optimizer.weights), p=p)
    for mine, plain in zip(found, wanted):
        torch.testing.assert_close(mine, plain, rtol=20 * ends.eps, atol=20 * ends.eps, equal_nan=True)


@on_kernels
def test_gradcheck_twice(backend: str) -> None:
    optimizer, _, state = problem(3, 2, 2, device=device_of(backend))
    grads = torch.tensor([0.3, -2.0, 1e-6], dtype=torch.float64, device=state.device)
    inputs = [t.detach().requires_grad_() for t in (grads, state, *optimizer.weights)]

    def call(grads: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return mf.ops.lstm_update(grads, state, weights, p=1.0)

    with mf.use_backend(backend):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@on_kernels
def test_opcheck(backend: str) -> None:
    optimizer, grads, state = problem(5, 3, 2, device=device_of(backend))
    weights = [w.detach().requires_grad_() for w in optimizer.weights]
    plain = [w.detach() for w in weights]  # it has no derivative: twice goes by the twin
    with mf.use_backend(backend):
        torch.library.opcheck(torch.ops.metafast.lstm_update, (grads.requires_grad_(), state, weights, 10.0))
        torch.library.opcheck(
            torch.ops.metafast.lstm_update_backward, (grads.detach(), None, grads.detach(), state, plain, 10.0)
        )
        torch.library.opcheck(
            torch.ops.metafast.lstm_update_backward, (grads.detach(), None, grads.detach(), state, plain, 10.0, False)
        )


@needs_kernels
def test_inside_torch_compile() -> None:
    optimizer, grads, state = problem(5, 3, 1)
    weights = list(optimizer.weights)

    def call(grads: Tensor, state: Tensor) -> Tensor:
        updates, state = mf.ops.lstm_update(grads, state, weights)
        return mf.ops.lstm_update(2 * updates, state, weights)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grads, state), call(grads, state))


@on_kernels
def test_under_vmap(backend: str) -> None:
    optimizer, grads, state = problem(12, 3, 2, device=device_of(backend))
    weights = list(optimizer.weights)
    stacked = [torch.stack([w, 2 * w]) for w in weights]
    with mf.use_backend(backend):
        updates, carried = mf.ops.lstm_update(grads, state, weights)
        many, many_carried = torch.vmap(lambda g, s: mf.ops.lstm_update(g, s, weights), (0, 2), (0, 2))(
            grads.view(4, 3), state.view(2, 2, 4, 3, 3)
        )
        each = torch.vmap(lambda *w: mf.ops.lstm_update(grads, state, w)[0])(*stacked)
    torch.testing.assert_close(many.reshape(-1), updates)
    torch.testing.assert_close(many_carried.reshape(carried.shape), carried)
    torch.testing.assert_close(each[0], updates)


@on_kernels
def test_memory_that_is_not_contiguous(backend: str) -> None:
    optimizer, grads, state = problem(21, 4, 2, device=device_of(backend))
    plain = list(optimizer.weights)
    spread = [torch.stack([w.detach(), w.detach()], dim=-1)[..., 0].requires_grad_() for w in plain]
    strided = state.transpose(0, 3).contiguous().transpose(0, 3)
    assert not strided.is_contiguous() and not spread[0].is_contiguous()
    results = []
    for g, s, weights in ((grads, state, plain), (torch.stack([grads, grads], 1)[:, 1], strided, spread)):
        with mf.use_backend(backend):
            updates, carried = mf.ops.lstm_update(g, s, weights)
            pulled = torch.autograd.grad(carried.sum() + updates.sum(), weights)
        results.append([updates, carried, *pulled])
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*results, strict=True))


@on_kernels
def test_no_coordinates_and_a_gradient_that_is_not_finite(backend: str) -> None:
    optimizer, _, _ = problem(3, 3, 1, device=device_of(backend))
    weights, where = list(optimizer.weights), {"dtype": torch.float64, "device": device_of(backend)}
    with mf.use_backend(backend):
        updates, carried = mf.ops.lstm_update(torch.empty(0, **where), optimizer.init(0), weights)
        assert updates.shape == (0,) and carried.shape == (1, 2, 0, 3)
        pulled = torch.autograd.grad(carried.sum() + updates.sum(), weights)
        assert all(bool((d == 0).all()) for d in pulled)
        updates, _ = mf.ops.lstm_update(torch.tensor([1.0, math.nan], **where), optimizer.init(2), weights)
    assert updates[0].isfinite() and updates[1].isnan()


@needs_kernels
def test_a_range_beyond_float32() -> None:
    with pytest.raises(ValueError, match="^p: expected at most 80"):
        mf.LSTMOptimizer(3, p=1000.0)


@pytest.mark.parametrize("change", ["pre-hook", "backward hook", "own forward", "tied"])
def test_an_optimiser_that_is_more_than_its_class(change: str) -> None:
    """The rule's own vector-Jacobian product stands back for autograd."""
    from tests.nets import build, episodes_for, gradient

    optimizer = mf.LSTMOptimizer(3, 2).double()
    if change == "pre-hook":
        optimizer.register_forward_pre_hook(lambda module, args: (3 * args[0], args[1]))
    elif change == "backward hook":
        optimizer.register_full_backward_hook(
            lambda module, grads, outputs: (None if grads[0] is None else 2 * grads[0], *grads[1:])
        )
    elif change == "own forward":
        plain = optimizer.forward
        optimizer.forward = lambda grads, state: plain(3 * grads, state)
    else:
        optimizer.weights[4] = optimizer.weights[1]

    class Generic(mf.LearnedRule):
        """A subclass goes by autograd."""

    model, episodes = build("mlp"), episodes_for("mlp")
    found = []
    for rule in (mf.LearnedRule(optimizer, 0.1), Generic(optimizer, 0.1)):
        learner = mf.GradientLearner(model, rule, steps=3)
        learner.zero_grad()
        learner(episodes).loss.backward()
        found.append(gradient(learner))
    assert float(found[0].norm()) > 0
    assert relative_error(found[0], found[1]) < BAR


@needs_kernels
def test_more_layers_than_the_kernels_take() -> None:
    optimizer, grads, state = problem(3, 2, 9)
    optimizer.requires_grad_(False)
    wanted = lstm_step(grads, state, list(optimizer.weights), optimizer.p)[0]
    assert relative_error(mf.ops.lstm_update(grads, state, list(optimizer.weights), p=optimizer.p)[0], wanted) <= BAR
    with mf.use_backend("cpu"), pytest.raises(ValueError, match="^grads: backend 'cpu' is forced, .* 8 layers, got 9"):
        mf.ops.lstm_update(grads, state, list(optimizer.weights), p=optimizer.p)
