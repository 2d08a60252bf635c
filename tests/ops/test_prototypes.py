"""The prototype head: kernels and twin against a plain float64 formula, forward, backward and twice; torch's checks."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metafast as mf
from metafast.ops.prototypes import METRICS
from tests.backends import device_of, in_every_order, on_backends, on_kernels, poisoned
from tests.backends import native as needs_kernels
from tests.ops.heads import BAR, SIZES, arguments, close, gradients, problem, ragged
from tests.ops.heads import masked as with_masks

on_metrics = pytest.mark.parametrize("metric", METRICS)


@on_backends
@on_metrics
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size: tuple[int, int, int, int, int], metric: str, backend: str) -> None:
    head = problem(*size).on(backend)
    with mf.use_backend(backend), poisoned():
        found = gradients(head, metric, "run")
        logits = mf.ops.prototype_logits(head.support, head.support_labels, head.query, head.ways, metric)
        losses = mf.ops.prototype_loss(
            head.support, head.support_labels, head.query, head.query_labels, head.ways, metric
        )
    wanted = gradients(head, metric, "plain")
    for mine, exact in zip([*found, losses, logits], [*wanted, *wanted[:2]]):
        assert close(mine, exact)


@on_backends
@on_metrics
@pytest.mark.parametrize("of", ["losses", "logits"])
def test_one_cotangent_alone(of: str, metric: str, backend: str) -> None:
    head = problem(2, 5, 2, 23, 20).on(backend)
    with mf.use_backend(backend), poisoned():
        found = gradients(head, metric, "run", of)
    for mine, exact in zip(found, gradients(head, metric, "plain", of)):
        assert close(mine, exact)


@on_backends
@on_metrics
@pytest.mark.parametrize("features", [1, 16, 19])
def test_ragged_episodes(features: int, metric: str, backend: str) -> None:
    """Absent classes, samples and queries, whose embeddings are NaN and whose labels are none."""
    if metric == "cosine" and features == 1:
        pytest.skip("no derivative but rounding")
    head = ragged(features).on(backend)
    with mf.use_backend(backend), poisoned():
        found = gradients(head, metric, "run")
    wanted = gradients(head, metric, "plain")
    for mine, exact in zip(found, wanted[:2]):
        assert close(mine, exact)
    for mine, exact, mask in zip(found[2:], wanted[2:], head.masks):
        assert mask is not None
        assert close(mine[mask], exact[mask]) and bool((mine[~mask] == 0).all())


@on_backends
@pytest.mark.parametrize("which", ["support_mask", "query_mask", "ways_mask"])
def test_a_mask_alone(which: str, backend: str) -> None:
    head = problem(2, 3, 2, 9, 5)
    mask = {
        "support_mask": torch.ones_like(head.support_labels, dtype=torch.bool),
        "query_mask": torch.arange(9).expand(2, 9) % 3 > 0,
        "ways_mask": torch.tensor([[1, 1, 1, 0]] * 2, dtype=torch.bool),
    }[which]
    if which == "ways_mask":
        head = replace(head, ways=4)
    if which == "support_mask":
        mask[:, head.support_labels[1].tolist().index(1)] = False
    head = replace(head, **{which: mask}).on(backend)
    with mf.use_backend(backend):
        for mine, exact in zip(gradients(head, "euclidean", "run"), gradients(head, "euclidean", "plain")):
            assert close(mine, exact)


@needs_kernels
@on_metrics
@pytest.mark.parametrize("size", [(1, 5, 3, 400, 70), (3, 20, 2, 130, 33), (40, 5, 1, 75, 64)], ids=str)
def test_the_same_bits_for_any_number_of_threads(size: tuple[int, int, int, int, int], metric: str) -> None:
    head = problem(*size).to(torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(gradients(head, metric, "run"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@on_kernels
@on_metrics
@pytest.mark.parametrize(("size", "dtype"), [((3, 7, 2, 35, 19), torch.float32), ((1, 5, 1, 33, 129), torch.float64)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_in_every_order(
    masked: bool, size: tuple[int, int, int, int, int], dtype: torch.dtype, metric: str, backend: str
) -> None:
    head = (ragged(size[-1]) if masked else problem(*size)).to(dtype).on(backend)
    with mf.use_backend(backend), poisoned():
        found = in_every_order(backend, lambda: gradients(head, metric, "run"))
    masks = (None, None, head.support_mask, head.query_mask)
    for mine, exact, mask in zip(found, gradients(head, metric, "plain"), masks, strict=True):
        wanted = exact if mask is None else exact.masked_fill(~mask.unsqueeze(-1), 0)
        assert close(mine, wanted, 1e-4 if dtype == torch.float32 else BAR)


@on_kernels
@on_metrics
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("size", [(4, 5, 1, 75, 64), (2, 20, 5, 60, 1600)], ids=str)
def test_float32_errs_at_most_twice_as_much_as_torch(
    size: tuple[int, int, int, int, int], offset: float, metric: str, backend: str
) -> None:
    head = problem(*size, offset=offset).on(backend)
    head = head.to(torch.float32).to(torch.float64)  # the very same numbers
    exact = gradients(head, metric, "plain")
    single = head.to(torch.float32)
    with mf.use_backend(backend):
        found = gradients(single, metric, "run")
    for mine, torchs, wanted in zip(found, gradients(single, metric, "plain"), exact):
        mine_error, torchs_error = ((t.double() - wanted).norm() / wanted.norm() for t in (mine, torchs))
        assert float(mine_error) <= 2 * float(torchs_error) + 1e-6


@on_backends
def test_memory_that_is_not_contiguous(backend: str) -> None:
    head = problem(3, 4, 2, 11, 10).on(backend)
    strided = replace(
        head,
        support=head.support.transpose(0, 2).contiguous().transpose(0, 2),
        support_labels=head.support_labels.t().contiguous().t(),
        query=torch.stack([head.query, head.query], dim=-1)[..., 0],
        query_labels=head.query_labels.repeat_interleave(2, dim=1)[:, ::2],
    )
    assert not strided.query.is_contiguous() and not strided.support_labels.is_contiguous()
    with mf.use_backend(backend):
        for mine, exact in zip(gradients(strided, "sqeuclidean", "run"), gradients(head, "sqeuclidean", "plain")):
            assert close(mine, exact)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_euclidean_at_and_near_distance_0(dtype: torch.dtype, backend: str) -> None:
    """At 0 the gradient is 0; near it direction and distance keep all their digits, far from the origin."""
    step = 2.0**-9
    where = {"dtype": dtype, "device": device_of(backend)}
    support = torch.tensor([[[1024.0, 512.0], [0.0, 0.0]]], **where)
    query = torch.tensor([[[1024.0, 512.0], [1024.0 + 3 * step, 512.0 + 4 * step]]], **where).requires_grad_()
    labels = torch.tensor([[0, 1]], device=support.device)
    with mf.use_backend(backend):
        logits = mf.ops.prototype_logits(support, labels, query, 2, "euclidean")
        [d_query] = torch.autograd.grad(logits[..., 0].sum(), query, create_graph=True)
        [dd_query] = torch.autograd.grad(d_query.sum(), query)
    assert logits[0, :, 0].tolist() == [0.0, -5 * step]
    torch.testing.assert_close(d_query.detach(), torch.tensor([[[0.0, 0.0], [-0.6, -0.8]]], **where))
    assert torch.isfinite(dd_query).all() and dd_query[0, 0].tolist() == [0.0, 0.0]


@on_backends
def test_cosine_of_a_zero_vector_is_that_of_normalize(backend: str) -> None:
    head = problem(1, 3, 1, 4, 5, offset=0.0)
    head.support[0, int((head.support_labels[0] == 2).nonzero()[0])] = 0
    head = replace(head, support=head.support * (head.support_labels != 2).unsqueeze(-1))
    head.query[0, 1] = 0
    head = head.on(backend)
    leaves = [head.support.clone().requires_grad_(), head.query.clone().requires_grad_()]
    means = torch.stack([leaves[0][0, head.support_labels[0] == c].mean(0) for c in range(3)])
    plain = F.normalize(leaves[1][0], dim=-1) @ F.normalize(means, dim=-1).t()
    wanted = torch.autograd.grad(plain[:, :2].sum() + plain[:, 2].sum(), leaves)
    with mf.use_backend(backend):
        logits = mf.ops.prototype_logits(leaves[0], head.support_labels, leaves[1], 3, "cosine")
        found = torch.autograd.grad(logits.sum(), leaves)
    assert close(logits.detach()[0], plain.detach())
    for mine, exact in zip(found, wanted):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@on_backends
def test_cosines_of_short_and_of_long_queries(backend: str) -> None:
    """A vector's length is lost on its cosines, but its gradients' own."""
    head = problem(1, 3, 2, 10, 20)
    for scale in (1e-6, 1e6):
        lengths = torch.where(torch.arange(10) % 3 == 0, scale, 1.0).unsqueeze(-1)
        scaled = replace(head, query=head.query * lengths).on(backend)
        with mf.use_backend(backend):
            found = gradients(scaled, "cosine", "run")
        wanted = gradients(scaled, "cosine", "plain")
        for mine, exact in zip([*found, found[3][:, 0], found[3][:, 1]], [*wanted, wanted[3][:, 0], wanted[3][:, 1]]):
            assert close(mine, exact)


@on_backends
@on_metrics
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_twice(masked: bool, metric: str, backend: str) -> None:
    head = problem(2, 3, 1, 4, 3)
    if masked:
        head = replace(
            head,
            ways=4,
            query_mask=torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool),
            ways_mask=torch.tensor([[1, 1, 1, 0]] * 2, dtype=torch.bool),
        )
    head = head.on(backend)

    def call(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        losses, logits = head.run(metric, support, query)
        return losses, logits[..., :3]

    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    with mf.use_backend(backend):
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@needs_kernels
def test_three_times() -> None:
    head = problem(1, 3, 1, 4, 2)

    def third(by: str) -> Tensor:
        query = head.query.clone().requires_grad_()
        value = getattr(head, by)("sqeuclidean", head.support, query)[0].sum()
        for _ in range(3):
            [value] = torch.autograd.grad(value.sin().sum(), query, create_graph=True)
        return value.detach()

    assert close(third("run"), third("plain"))


@on_kernels
@on_metrics
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
def test_opcheck(with_labels: bool, masked: bool, metric: str, backend: str) -> None:
    head = problem(2, 3, 1, 4, 3)
    head = (with_masks(head) if masked else head).on(backend)
    head.support.requires_grad_(), head.query.requires_grad_()
    with mf.use_backend(backend):
        torch.library.opcheck(torch.ops.metafast.prototype_head, arguments(head, metric, with_labels))
        head = replace(head, support=head.support.detach(), query=head.query.detach())
        s, y, q, labels, *plain = arguments(head, metric, with_labels)
        _, *kept = torch.ops.metafast.prototype_head(s, y, q, labels, *plain)
        d_losses = torch.tensor([1.0, -2.0]).to(s) if with_labels else None
        d_logits = torch.randn(2, 4, 3).to(s)
        torch.library.opcheck(
            torch.ops.metafast.prototype_head_backward, (d_losses, d_logits, s, y, q, labels, *kept, *plain)
        )


@on_kernels
@on_metrics
def test_the_operator_of_other_devices(metric: str, backend: str) -> None:
    """What runs where there are no kernels, held against them."""
    from metafast.ops import prototypes

    for head in (ragged().on(backend), problem(3, 4, 2, 7, 5).on(backend)):
        found = prototypes._operator(*arguments(head, metric))
        with mf.use_backend(backend), poisoned():
            wanted = torch.ops.metafast.prototype_head(*arguments(head, metric))
        for mine, exact in zip(found, wanted):
            assert mine.shape == exact.shape and close(mine, exact)
        s, y, q, labels, *plain = arguments(head, metric)
        cotangents = (torch.tensor([1.0, -2.0, 3.0]).to(s), torch.randn_like(found[1]))
        for pair in (cotangents, (cotangents[0], None), (None, cotangents[1])):
            given = (*pair, s, y, q, labels, *found[1:], *plain)
            with mf.use_backend(backend), poisoned():
                pulled = torch.ops.metafast.prototype_head_backward(*given)
            for mine, exact in zip(prototypes._operator_backward(*given), pulled):
                assert close(mine, exact)


WITHOUT_EXTENSION = """
import torch, metafast
assert not metafast._native.status().available
torch.manual_seed(0)
support, query = torch.randn(2, 2, 6, 3).double().requires_grad_().unbind(0)
labels, query_labels = torch.arange(3).repeat(2, 2), torch.randint(3, (2, 6))
for metric in ("sqeuclidean", "euclidean", "cosine"):
    def call(s, q):
        return torch.ops.metafast.prototype_head(s, labels, q, query_labels, 3, metric, None, None, None)[:2]
    assert torch.autograd.gradcheck(call, (support, query)) and torch.autograd.gradgradcheck(call, (support, query))
"""


def test_the_operator_without_the_extension(tmp_path: Path) -> None:
    """Its derivatives are then those of Python, twice."""
    package = Path(mf.__file__).parent
    shutil.copytree(package, tmp_path / "metafast", ignore=shutil.ignore_patterns("_C*.so", "_build_info.json"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METAFAST_")}
    subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], cwd=tmp_path, env=environment, check=True)


@needs_kernels
def test_inside_torch_compile() -> None:
    head = problem(2, 3, 2, 7, 5)

    def call(support: Tensor, query: Tensor) -> Tensor:
        losses = mf.ops.prototype_loss(2 * support, head.support_labels, query, head.query_labels, 3, "euclidean")
        logits = mf.ops.prototype_logits(support, head.support_labels, query.tanh(), 3)
        return losses.sum() + logits.square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [head.support.requires_grad_(), head.query.requires_grad_()]
    found, wanted = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(found, wanted)
    for mine, exact in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(mine, exact)


@needs_kernels
def test_under_vmap() -> None:
    head = ragged()
    support, query = (t.nan_to_num() for t in (head.support, head.query))
    batch = torch.stack([query, 2 * query, query + 1], dim=2)
    for labelled in (True, False):

        def call(
            query: Tensor, support: Tensor = support, labelled: bool = labelled
        ) -> Tensor:  # bound: the loop goes on
            losses, logits = head.run("sqeuclidean", support, query)
            return losses if labelled else logits.exp()

        each = torch.stack([call(one) for one in batch.unbind(2)])
        torch.testing.assert_close(torch.vmap(call, in_dims=2)(batch), each)
        nested = torch.vmap(lambda s, call=call: torch.vmap(lambda q: call(q, s), in_dims=2)(batch))(
            support.repeat(2, 1, 1, 1)
        )
        torch.testing.assert_close(nested, torch.stack([each, each]))
    jacobians = [
        torch.autograd.functional.jacobian(lambda q: head.run("cosine", support, q)[0], query + 1, vectorize=v)
        for v in (True, False)
    ]
    torch.testing.assert_close(jacobians[0], jacobians[1])


@needs_kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp
def test_torch_func() -> None:
    """Derivatives of torch.func go by the twin; the kernels run beside them for what is not differentiated."""
    head = problem(2, 3, 2, 7, 5)
    query = head.query.clone().requires_grad_()
    [wanted] = torch.autograd.grad(head.run("euclidean", None, query)[0].sum(), query)
    found = torch.func.grad(lambda q: head.run("euclidean", None, q)[0].sum())(head.query)
    torch.testing.assert_close(found, wanted)
    factor = torch.func.grad(lambda x: (x * head.run("euclidean", None, query)[0]).sum())(torch.tensor(2.0).double())
    torch.testing.assert_close(factor, head.run("euclidean")[0].sum())
    value, tangent = torch.func.jvp(
        lambda q: head.run("sqeuclidean", None, q)[0].sum(), (head.query,), (torch.ones_like(head.query),)
    )
    [grad] = torch.autograd.grad(head.run("sqeuclidean", None, query)[0].sum(), query)
    torch.testing.assert_close(tangent, grad.sum())
    torch.testing.assert_close(value, head.run("sqeuclidean")[0].sum())


def with_label(labels: Tensor, task: int, sample: int, label: int) -> Tensor:
    changed = labels.clone()
    changed[task, sample] = label
    return changed


LABELS, ASKED = torch.arange(3).repeat(2, 2), torch.zeros(2, 4, dtype=torch.int64)
TWO_OF_THREE = torch.tensor([[True, True, True], [True, False, True]])


@on_backends
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"support_labels: expected labels 0\.\.2, got 0\.\.3", {"support_labels": with_label(LABELS, 1, 2, 3)}),
        (r"query_labels: expected labels 0\.\.2, got -1\.\.0", {"query_labels": with_label(ASKED, 0, 3, -1)}),
        (
            r"support_labels: every class 0\.\.2 needs support, task 1 has none of 2",
            {"support_labels": torch.stack([LABELS[0], LABELS[1] % 2])},
        ),
        (
            r"support_labels: every class 0\.\.2 needs support, task 0 has none of 1",
            {"support_mask": torch.stack([LABELS[0] != 1, LABELS[1] >= 0])},
        ),
        (r"support_labels: expected classes of ways_mask, task 1 does not have 1", {"ways_mask": TWO_OF_THREE}),
        (
            r"query_labels: expected classes of ways_mask, task 1 does not have 1",
            {
                "ways_mask": TWO_OF_THREE,
                "support_labels": LABELS.where(TWO_OF_THREE.repeat(1, 2), 0),
                "query_labels": with_label(ASKED, 1, 2, 1),
            },
        ),
        (
            "query_mask: every task needs a query, task 1 has none",
            {"query_mask": torch.tensor([[True] * 4, [False] * 4])},
        ),
        ("query_labels: expected a tensor, got None", {"query_labels": None}),
        (r"support_mask: expected shape \(2, 6\)", {"support_mask": torch.ones(2, 5, dtype=torch.bool)}),
        (r"query_mask: expected a bool mask", {"query_mask": torch.ones(2, 4)}),
        (r"ways_mask: expected shape \(2, 3\)", {"ways_mask": torch.ones(3, dtype=torch.bool)}),
        ("metric: expected one of 'sqeuclidean', 'euclidean', 'cosine', got 'l1'", {"metric": "l1"}),
    ],
)
def test_what_does_not_fit(message: str, change: dict[str, object], backend: str) -> None:
    given = {
        "support": torch.zeros(2, 6, 3),
        "support_labels": LABELS,
        "query": torch.zeros(2, 4, 3),
        "query_labels": ASKED,
        "ways": 3,
    } | change
    given = {name: x.to(device_of(backend)) if isinstance(x, Tensor) else x for name, x in given.items()}
    with mf.use_backend(backend), pytest.raises((TypeError, ValueError), match=f"^{message}"):
        mf.ops.prototype_loss(**given)


@needs_kernels
def test_the_operator_itself_checks_what_it_is_given() -> None:
    s, y, q, labels, *plain = arguments(problem(2, 3, 1, 4, 3), "sqeuclidean")
    op = torch.ops.metafast.prototype_head
    with pytest.raises(ValueError, match="^metric: expected 'sqeuclidean', 'euclidean' or 'cosine', got 'l1'"):
        op(s, y, q, labels, 3, "l1", None, None, None)
    with pytest.raises(TypeError, match="^query: expected dtype Double, got Float"):
        op(s, y, q.float(), labels, *plain)
    with pytest.raises(ValueError, match=r"^query_labels: expected shape \[2, 4\]"):
        op(s, y, q, labels[:, :3], *plain)
    _, *kept = op(s, y, q, None, *plain)
    with pytest.raises(ValueError, match="^d_losses: expected none without query_labels"):
        torch.ops.metafast.prototype_head_backward(torch.ones(2).double(), None, s, y, q, None, *kept, *plain)
    with pytest.raises(ValueError, match="^residual: expected shape"):
        torch.ops.metafast.prototype_head_backward(torch.ones(2).double(), None, s, y, q, labels, *kept, *plain)


@on_kernels
def test_values_that_are_not_finite_are_not_hidden(backend: str) -> None:
    head = problem(2, 3, 1, 20, 5)
    head.query[1, 4, 2] = math.nan
    head = head.on(backend)
    for metric in METRICS:
        with mf.use_backend(backend):
            losses, logits, d_support, d_query = gradients(head, metric, "run")
        assert losses[0].isfinite() and losses[1].isnan() and logits[1, 4].isnan().all()
        assert int(logits.isnan().sum()) == 3
        assert d_query[1, 4].isnan().any() and d_query[0].isfinite().all() and d_support[1].isnan().any()
