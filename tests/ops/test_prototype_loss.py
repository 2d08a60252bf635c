"""Losses of prototypes with their gradients, which the CPU's kernel makes at once, against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import metafast as mf
from metafast.ops.prototypes import METRICS
from tests.backends import in_every_order, on_backends, on_kernels, poisoned
from tests.backends import native as needs_kernels
from tests.ops.heads import SIZES, Head, arguments, close, problem, ragged
from tests.ops.heads import masked as with_masks

on_metrics = pytest.mark.parametrize("metric", METRICS)
Reduce = Callable[[Tensor], Tensor]


def uneven(losses: Tensor) -> Tensor:
    return (losses * torch.arange(1, len(losses) + 1, device=losses.device)).sum()


def run(head: Head, metric: str, support: Tensor, query: Tensor) -> Tensor:
    return mf.ops.prototype_loss(
        support,
        head.support_labels,
        query,
        head.query_labels,
        head.ways,
        metric,
        support_mask=head.support_mask,
        query_mask=head.query_mask,
        ways_mask=head.ways_mask,
    )


def plain(head: Head, metric: str, support: Tensor, query: Tensor) -> Tensor:
    return head.plain(metric, support, query)[0]


def gradients(
    head: Head, metric: str, by: Callable[[Head, str, Tensor, Tensor], Tensor] = run, reduce: Reduce = torch.mean
) -> list[Tensor]:
    """Losses and the embeddings' cotangents."""
    leaves = [head.support.detach().requires_grad_(), head.query.detach().requires_grad_()]
    losses = by(head, metric, *leaves)
    return [losses.detach(), *torch.autograd.grad(reduce(losses), leaves)]


@on_backends
@on_metrics
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_and_gradients(size: tuple[int, int, int, int, int], offset: float, metric: str, backend: str) -> None:
    head = problem(*size, offset=offset).on(backend)
    if metric == "cosine" and size[-1] == 1:
        pytest.skip("no derivative but rounding")
    for reduce in (torch.mean, uneven):
        with mf.use_backend(backend), poisoned():
            found = gradients(head, metric, run, reduce)
        for mine, exact in zip(found, gradients(head, metric, plain, reduce)):
            assert close(mine, exact)


@on_backends
@on_metrics
@pytest.mark.parametrize("features", [16, 19])
def test_ragged_episodes(features: int, metric: str, backend: str) -> None:
    """Absent classes, samples and queries, whose embeddings are NaN and whose labels are none."""
    head = ragged(features).on(backend)
    with mf.use_backend(backend), poisoned():
        losses, *found = gradients(head, metric)
    exact_losses, *wanted = gradients(head, metric, plain)
    assert close(losses, exact_losses)
    for mine, exact, mask in zip(found, wanted, head.masks):
        assert mask is not None
        assert close(mine[mask], exact[mask]) and bool((mine[~mask] == 0).all())


def clusters(apart: float) -> Head:
    """Classes in two clusters, `apart` from each other in every feature and about 1 wide."""
    head = problem(2, 6, 2, 130, 24, offset=0.0)
    of_class = apart * (torch.arange(6) % 2).double()
    return replace(
        head,
        support=head.support + of_class[head.support_labels].unsqueeze(-1),
        query=head.query + of_class[head.query_labels].unsqueeze(-1),
    )


@on_kernels
@pytest.mark.parametrize("apart", [0.1, 0.3, 0.5, 0.6, 0.7, 1.0, 30.0, 3000.0])
def test_classes_that_are_near_and_far(apart: float, backend: str) -> None:
    """The CPU's kernel takes products where that costs no digits, else differences: float32 errs as torch's does."""
    head = clusters(apart).on(backend)
    with mf.use_backend(backend):
        found = gradients(head, "sqeuclidean")
    for mine, wanted in zip(found, gradients(head, "sqeuclidean", plain)):
        assert close(mine, wanted)
    single = head.to(torch.float32)
    with mf.use_backend(backend):
        found = gradients(single, "sqeuclidean")
    exact = gradients(single.to(torch.float64), "sqeuclidean", plain)
    for mine, torchs, wanted in zip(found, gradients(single, "sqeuclidean", plain), exact):
        mine_error, torchs_error = ((t.double() - wanted).norm() / wanted.norm() for t in (mine, torchs))
        assert float(mine_error) <= 2 * float(torchs_error) + 1e-6


@on_kernels
@on_metrics
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("size", [(4, 5, 1, 75, 64), (2, 20, 5, 60, 1600)], ids=str)
def test_float32_errs_at_most_twice_as_much_as_torch(
    size: tuple[int, int, int, int, int], offset: float, metric: str, backend: str
) -> None:
    for wide in (1.0, 8.0):  # classes near each other, and not
        head = problem(*size, offset=offset)
        head = replace(head, support=wide * head.support, query=wide * head.query).on(backend).to(torch.float32)
        exact = gradients(head.to(torch.float64), metric, plain)
        with mf.use_backend(backend):
            found = gradients(head, metric)
        for mine, torchs, wanted in zip(found, gradients(head, metric, plain), exact):
            mine_error, torchs_error = ((t.double() - wanted).norm() / wanted.norm() for t in (mine, torchs))
            assert float(mine_error) <= 2 * float(torchs_error) + 1e-6


@on_kernels
@on_metrics
@pytest.mark.parametrize("ways", [3, 5, 9])
def test_a_query_that_is_no_number_spoils_no_other(ways: int, metric: str, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        head = problem(2, ways, 2, 13, 19).on(backend).to(dtype)
        with mf.use_backend(backend):
            _, _, before = gradients(head, metric)
            head.query[0, 4, 18] = math.nan
            _, _, after = gradients(head, metric)
        others = [q for q in range(13) if q != 4]
        assert torch.equal(before[0, others], after[0, others]) and torch.equal(before[1], after[1])
        assert bool(after[0, 4].isnan().any())


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {"ways": torch.tensor(4)},
        {"ways": torch.tensor(4.7)},
        {"ways": 0},
        {"ways": 3},
        {"ways": True},
        {"metric": b"cosine"},
        {"metric": "manhattan"},
        {"support": [1.0]},
        {"support": torch.tensor(1.0, requires_grad=True)},
        {"support": torch.zeros(0, 9, 5, requires_grad=True)},
        {"support_labels": [0, 1]},
        {"support_labels": meta},
        {"support_labels": Tensor.int},
        {"query": meta},
        {"query": lambda q: q[..., :2]},
        {"query_labels": meta},
        {"query_labels": lambda y: y[:, :2]},
        {"query_labels": lambda y: y - 2**62},
        {"query_labels": lambda y: y.clone().fill_(2**63 - 1)},
        {"query_mask": torch.ones(3, 9, dtype=torch.bool, device="meta")},
        {"query_mask": torch.ones(3, 9)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_does_not_fit_is_refused_by_name_with_and_without_gradients(changes: dict[str, object]) -> None:
    head = problem(3, 4, 2, 9, 5)
    values: dict[str, object] = {f.name: getattr(head, f.name) for f in fields(head)} | {"metric": "sqeuclidean"}
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    said = []
    for wanted in (True, False):
        for name in ("support", "query"):
            if isinstance(values[name], Tensor):
                values[name] = values[name].detach().requires_grad_(wanted)
        with pytest.raises((TypeError, ValueError), match=rf"^({'|'.join(changes)}|support_labels|query): ") as refusal:
            mf.ops.prototype_loss(**values)
        said.append(str(refusal.value))
    assert said[0] == said[1]


@needs_kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_is_refused_where_it_would_be_lost() -> None:
    head = problem(2, 3, 2, 5, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(head.support.requires_grad_(), torch.ones_like(head.support))
        wanted = forward_ad.unpack_dual(plain(head, "sqeuclidean", dual, head.query)).tangent
        found = forward_ad.unpack_dual(run(head, "sqeuclidean", dual, head.query)).tangent
        assert found is not None and close(found.detach(), wanted.detach())  # by torch's operations
        arguments = (dual, head.support_labels, head.query, head.query_labels, head.ways, "sqeuclidean", *head.masks)
        with pytest.raises(NotImplementedError, match="prototype_loss has no derivative in forward mode"):
            torch.ops.metafast.prototype_loss(*arguments, 0.5)


@needs_kernels
@on_metrics
@pytest.mark.parametrize("size", [(1, 5, 3, 400, 70), (3, 20, 2, 130, 33), (40, 5, 1, 75, 64)], ids=str)
def test_the_same_bits_for_any_number_of_threads(size: tuple[int, int, int, int, int], metric: str) -> None:
    head = problem(*size, offset=0.0).to(torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(gradients(head, metric))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@on_kernels
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_in_every_order(masked: bool, backend: str) -> None:
    head = (ragged() if masked else problem(3, 7, 2, 35, 19)).to(torch.float32).on(backend)
    with mf.use_backend(backend), poisoned():
        in_every_order(backend, lambda: gradients(head, "sqeuclidean"))


@needs_kernels
def test_gradients_are_handed_out_once() -> None:
    """With the graph kept, whoever gets them may change them; without it they are the forward's own."""
    head = problem(3, 4, 2, 9, 5)
    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    loss = run(head, "sqeuclidean", *leaves).mean()
    wanted = gradients(head, "sqeuclidean", plain)[1:]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for mine in first:
        mine.mul_(3)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for mine, again, once_more, exact in zip(first, second, third, wanted):
        assert close(mine / 3, exact) and close(again, exact) and close(once_more, exact)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@needs_kernels
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda losses: -losses.mean(), uneven])
def test_any_cotangent(reduce: Reduce) -> None:
    head = problem(5, 4, 2, 9, 5)
    for mine, exact in zip(gradients(head, "sqeuclidean", run, reduce), gradients(head, "sqeuclidean", plain, reduce)):
        assert close(mine, exact)


@needs_kernels
def test_gradients_add_up_in_grad() -> None:
    head = problem(2, 3, 1, 6, 4)
    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    for _ in range(2):
        run(head, "sqeuclidean", *leaves).mean().backward()
    for leaf, exact in zip(leaves, gradients(head, "sqeuclidean", plain)[1:]):
        assert leaf.grad is not None and close(leaf.grad, 2 * exact)


@needs_kernels
def test_one_embedding_alone_and_none() -> None:
    head = problem(2, 3, 1, 6, 4)
    wanted = gradients(head, "sqeuclidean", plain)
    query = head.query.clone().requires_grad_()
    [d_query] = torch.autograd.grad(run(head, "sqeuclidean", head.support, query).mean(), query)
    assert close(d_query, wanted[2])
    with torch.no_grad():
        assert not run(head, "sqeuclidean", head.support, query).requires_grad
    assert not run(head, "sqeuclidean", head.support, head.query).requires_grad


@on_backends
@on_metrics
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_twice(masked: bool, metric: str, backend: str) -> None:
    head = problem(2, 3, 1, 4, 3)
    if masked:
        head = replace(head, query_mask=torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool))
    head = head.on(backend)
    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    with mf.use_backend(backend):
        assert torch.autograd.gradcheck(lambda s, q: run(head, metric, s, q), leaves)
        assert torch.autograd.gradgradcheck(lambda s, q: run(head, metric, s, q), leaves)


@needs_kernels
def test_three_times() -> None:
    head = problem(1, 3, 1, 4, 2)

    def third(by: Callable[[Head, str, Tensor, Tensor], Tensor]) -> Tensor:
        query = head.query.clone().requires_grad_()
        value = by(head, "sqeuclidean", head.support, query).sum()
        for _ in range(3):
            [value] = torch.autograd.grad(value.sin().sum(), query, create_graph=True)
        return value.detach()

    assert close(third(run), third(plain))


@on_kernels
@on_metrics
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, metric: str, backend: str) -> None:
    head = problem(2, 3, 1, 4, 3)
    head = (with_masks(head) if masked else head).on(backend)
    head.support.requires_grad_(), head.query.requires_grad_()
    with mf.use_backend(backend):
        torch.library.opcheck(torch.ops.metafast.prototype_loss, (*arguments(head, metric), 0.5))
        head = replace(head, support=head.support.detach(), query=head.query.detach())
        given = arguments(head, metric)
        losses, *kept = torch.ops.metafast.prototype_loss(*given, 0.5)
        cotangent = torch.tensor([1.0, -2.0]).to(losses)
        torch.library.opcheck(torch.ops.metafast.prototype_loss_backward, (cotangent, *given, *kept, 0.5))


@on_kernels
@on_metrics
def test_the_operator_of_other_devices(metric: str, backend: str) -> None:
    """What runs where there are no kernels, held against them."""
    from metafast.ops import prototype_loss  # the function
    from metafast.ops.prototype_loss import _operator

    assert prototype_loss is mf.ops.prototype_loss
    for head in (ragged().on(backend), problem(3, 4, 2, 7, 5).on(backend)):
        found = _operator(*arguments(head, metric), 0.25)
        with mf.use_backend(backend), poisoned():
            wanted = torch.ops.metafast.prototype_loss(*arguments(head, metric), 0.25)
        for mine, exact in zip(found, wanted):
            assert mine.shape == exact.shape and close(mine, exact)


@needs_kernels
def test_inside_torch_compile() -> None:
    head = problem(2, 3, 2, 7, 5)

    def call(support: Tensor, query: Tensor) -> Tensor:
        return run(head, "sqeuclidean", 2 * support, query.tanh()).mean() + run(head, "cosine", support, query).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    found, wanted = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(found, wanted)
    for mine, exact in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(mine, exact)


@needs_kernels
def test_under_vmap() -> None:
    head = problem(2, 3, 2, 7, 5)
    query = head.query.clone().requires_grad_()
    batch = torch.stack([query, 2 * query, query + 1], dim=2)
    each = torch.stack([run(head, "sqeuclidean", head.support, one) for one in batch.unbind(2)])
    found = torch.vmap(lambda q: run(head, "sqeuclidean", head.support, q), in_dims=2)(batch)
    torch.testing.assert_close(found, each)
    for mine, exact in zip(
        torch.autograd.grad(found.sum(), query, retain_graph=True), torch.autograd.grad(each.sum(), query)
    ):
        torch.testing.assert_close(mine, exact)
    jacobians = [
        torch.autograd.functional.jacobian(lambda q: run(head, "cosine", head.support, q), head.query, vectorize=v)
        for v in (True, False)
    ]
    torch.testing.assert_close(jacobians[0], jacobians[1])


@on_kernels
@on_metrics
def test_values_that_are_not_finite_are_not_hidden(metric: str, backend: str) -> None:
    head = problem(2, 3, 1, 20, 5, offset=0.0)
    head.query[1, 4, 2] = math.nan
    head = head.on(backend)
    with mf.use_backend(backend):
        losses, d_support, d_query = gradients(head, metric)
    assert losses[0].isfinite() and losses[1].isnan()
    assert d_query[1, 4].isnan().any() and d_query[0].isfinite().all() and d_support[1].isnan().any()


@needs_kernels
def test_what_is_far_weighs_nothing() -> None:
    """Probabilities far below what counts are 0, and their gradients with them."""
    support, query = torch.tensor([[[0.0], [20.0]]]), torch.tensor([[[0.0], [20.0], [10.0]]])
    labels = torch.tensor([[0, 1]])
    head = Head(support, labels, query, torch.tensor([[0, 1, 0]]), 2)
    losses, d_support, d_query = gradients(head, "sqeuclidean")
    exact = gradients(head.to(torch.float64), "sqeuclidean", plain)
    assert d_query[0, :2].eq(0).all()
    for mine, wanted in zip((losses, d_support, d_query), exact):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-30)
