"""Products of plain matrices by ATen in our kernels' place, as large ones go on a GPU: there by cuBLAS, here on the
emulator by the same calls with the same strides on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metafast as mf
from metafast import _native
from tests.backends import in_every_order, kernels_of, one_launch
from tests.engine import four_functions
from tests.engine.test_layers import FEATURES, case, episodes_of, head
from tests.nets import gradient, relative_error

pytestmark = kernels_of("simt")
BAR = 1e-10
PRODUCTS = {torch.ops.aten.bmm.out, torch.ops.aten.baddbmm_.default}


class Products(TorchDispatchMode):
    """Records ATen's products of batches and the strides of their two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.seen.append((func, [t.stride() for t in args[-2:]]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def library() -> Iterator[None]:
    """On simt, products of plain matrices go by ATen; small MLPs' meta-steps, which else have none, the general way."""
    module: Any = _native.native()
    module.simt_library_products(True)
    try:
        with one_launch(False):
            yield
    finally:
        module.simt_library_products(False)


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, to in itertools.pairwise(widths):
        layers += [nn.Linear(wide, to), act()]
    return nn.Sequential(*layers[:-1]).double()


def episodes(features: int, ways: int, tasks: int, shots: int, queries: int) -> mf.Episodes:
    g = torch.Generator().manual_seed(3)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, samples, features, dtype=torch.float64, generator=g)
        return x, torch.randint(ways, (tasks, samples), generator=g)

    return mf.Episodes(*side(shots), *side(queries))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("channels", [1, 8, 17, 33])
@pytest.mark.parametrize("name", FEATURES)
def test_four_functions_in_float64(name: str, channels: int) -> None:
    model, shape = case(name, channels, images=False)
    for samples, tasks in ((4, 2), (1, 3), (11, 1)):
        if samples == 1 and "norm" in name:
            continue  # torch refuses the statistics of one number
        e = episodes_of(shape, samples, "mse", tasks)
        with Products() as products:
            found, _ = four_functions.native(model, e, "mse", backend="simt")
        assert {func for func, _ in products.seen} == PRODUCTS
        wanted = four_functions.plain(model, e, "mse")
        for what in four_functions.NAMES:
            assert relative_error(found[what], wanted[what]) <= BAR, (what, samples)


@pytest.mark.usefixtures("library")
def test_convolutions_keep_our_kernel() -> None:
    """One tap on many pixels, and many on one, are no plain matrices; one on one is."""
    torch.manual_seed(0)
    for layer, shape, plain in (
        (nn.Conv2d(3, 5, 1), (3, 4, 3), False),
        (nn.Conv2d(3, 5, 3, padding=1), (3, 1, 1), False),
        (nn.Conv2d(3, 5, 1), (3, 1, 1), True),
    ):
        model = nn.Sequential(layer, nn.Flatten()).double()
        e = episodes_of(shape, 7)
        ways = model(e.support_x[0]).shape[1]
        target = torch.randn(2, 7, ways, dtype=torch.float64)
        e = mf.Episodes(e.support_x, target, e.query_x, target)
        with Products() as products:
            found, _ = four_functions.native(model, e, "mse", backend="simt")
        assert bool(products.seen) == plain
        wanted = four_functions.plain(model, e, "mse")
        for what in four_functions.NAMES:
            assert relative_error(found[what], wanted[what]) <= BAR, (what, shape)


@pytest.mark.usefixtures("library")
def test_float32_errs_at_most_twice_as_much_as_torch() -> None:
    model, e = head(nn.Linear(37, 41), nn.Linear(5, 37), nn.Tanh(), shape=(5,)), episodes_of((5,), 7)
    exact = four_functions.plain(model, e, "cross_entropy")
    single, e32 = model.float(), e.to(dtype=torch.float32)
    found, _ = four_functions.native(single, e32, "cross_entropy", backend="simt")
    torchs = four_functions.plain(single, e32, "cross_entropy")
    for what in four_functions.NAMES:
        error, allowed = (relative_error(r[what].double(), exact[what]) for r in (found, torchs))
        assert error <= 2 * allowed + 1e-6, what


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("widths", "act", "tasks", "shots", "queries"),
    [
        ((7, 19, 33, 5), nn.ReLU, 3, 5, 7),
        ((1, 17, 1, 3), nn.Tanh, 1, 1, 2),
        ((16, 16, 8), nn.ReLU, 2, 4, 8),
        ((13, 2), nn.ReLU, 5, 3, 1),
    ],
)
def test_meta_gradients(
    widths: tuple[int, ...], act: type[nn.Module], tasks: int, shots: int, queries: int, first_order: bool
) -> None:
    model, e = mlp(*widths, act=act), episodes(widths[0], widths[-1], tasks, shots, queries)
    maml = mf.MAML(model, lr=0.05, steps=3, first_order=first_order)
    with mf.use_backend("simt"), Products() as products:
        out = maml(e)
        out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    wanted = mf.reference.maml(model, e, lr=0.05, steps=3, first_order=first_order)
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) <= BAR
    assert relative_error(out.logits, wanted.logits) <= BAR
    assert relative_error(found, gradient(model)) <= BAR
    # Both ways of weights: all tasks' the same in the first step, each task's own after it.
    steps_between = {strides[1][0] for func, strides in products.seen if func is torch.ops.aten.bmm.out}
    assert 0 in steps_between and len(steps_between) > 1
    # Second pairs of factors: in tangents of layers whose input has one.
    added = any(func is torch.ops.aten.baddbmm_.default for func, _ in products.seen)
    assert added == (not first_order and len(widths) > 2)


@pytest.mark.usefixtures("library")
def test_the_same_bits_in_every_order_and_run() -> None:
    model, e = mlp(7, 19, 33, 5), episodes(7, 5, 3, 5, 7)
    maml = mf.MAML(model, lr=0.05, steps=2)

    def run() -> list[Tensor]:
        model.zero_grad()
        with mf.use_backend("simt"):
            out = maml(e)
            out.loss.backward()
        return [out.logits, gradient(model)]

    first = run()
    assert all(map(torch.equal, first, in_every_order("simt", run)))


@pytest.mark.usefixtures("library")
def test_a_nan_stays_one_tasks() -> None:
    """Products overwrite what they find, and shared weights carry nothing from task to task."""
    model, e = mlp(7, 19, 5), episodes(7, 5, 3, 5, 7)
    broken = e.support_x.clone()
    broken[1] *= 1e200  # the steps' products leave float64
    with mf.use_backend("simt"), torch.no_grad():
        maml = mf.MAML(model, lr=0.05, steps=2)
        whole, holed = maml(e), maml(mf.Episodes(broken, e.support_y, e.query_x, e.query_y))
    assert not holed.logits[1].isfinite().any()
    assert torch.equal(holed.logits[[0, 2]], whole.logits[[0, 2]])


def test_the_emulators_products_are_its_kernels_unless_asked() -> None:
    with Products() as products:
        four_functions.native(mlp(5, 9, 3), episodes(5, 3, 2, 4, 4), "cross_entropy", backend="simt")
    assert not products.seen
