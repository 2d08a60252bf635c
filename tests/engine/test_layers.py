"""The contract of every layer: all four functions, float64 to 1e-10 of plain autograd, float32 by house rule 13."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast import _native
from metafast.engine.lowering import Kind
from tests.backends import in_every_order, kernels_of, on_cpu_and_simt, poisoned
from tests.backends import native as needs_kernels
from tests.engine import four_functions
from tests.nets import relative_error

BAR = 1e-10
Build = Callable[[int], nn.Module]


class Sum(nn.Module):
    """x + branch(x): two gradients arrive at x."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


# For c channels or features.
ELEMENTWISE: dict[str, Build] = {
    "relu": lambda c: nn.ReLU(),
    "leaky_relu": lambda c: nn.LeakyReLU(0.1),
    "elu": lambda c: nn.ELU(0.8),
    "tanh": lambda c: nn.Tanh(),
    "sigmoid": lambda c: nn.Sigmoid(),
    "gelu": lambda c: nn.GELU(),
    "gelu_tanh": lambda c: nn.GELU(approximate="tanh"),
    "silu": lambda c: nn.SiLU(),
    "softplus": lambda c: nn.Softplus(2.0, 1.0),
}
FEATURES: dict[str, Build] = ELEMENTWISE | {
    "linear": lambda c: nn.Linear(c, 19),
    "linear without bias": lambda c: nn.Linear(c, 1, bias=False),
    "linear of few outputs": lambda c: nn.Linear(c, 2),
    "linear layers with relus between": lambda c: nn.Sequential(
        nn.Linear(c, 11), nn.ReLU(), nn.Linear(11, 2), nn.ReLU(), nn.Linear(2, c), nn.ReLU(), nn.Linear(c, 1), nn.Tanh()
    ),
    "batch_norm": lambda c: nn.BatchNorm1d(c),
    "batch_norm without affine": lambda c: nn.BatchNorm1d(c, affine=False),
    "batch_norm_relu_pool": lambda c: nn.Sequential(nn.BatchNorm1d(c), nn.ReLU()),
    "layer_norm": lambda c: nn.LayerNorm(c),
    "layer_norm without affine": lambda c: nn.LayerNorm(c, elementwise_affine=False),
    "group_norm": lambda c: nn.GroupNorm(1, c),
    "add": lambda c: Sum(nn.Linear(c, c)),
}
IMAGES: dict[str, Build] = ELEMENTWISE | {
    "conv2d": lambda c: nn.Conv2d(c, 9, 3, padding=1),
    "conv2d without padding": lambda c: nn.Conv2d(c, 17, (2, 3), bias=False),
    "conv2d with strides": lambda c: nn.Conv2d(c, 5, (3, 5), stride=(2, 3), padding=(1, 2)),
    "conv2d with strides beyond the kernel": lambda c: nn.Conv2d(c, 3, 1, stride=(2, 3)),
    "conv2d with much padding": lambda c: nn.Conv2d(c, 4, 2, padding=3),
    "batch_norm": lambda c: nn.BatchNorm2d(c),
    "batch_norm_relu_pool": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)),
    "batch_norm_relu_pool of three": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(3)),
    "batch_norm_relu": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "layer_norm": lambda c: nn.LayerNorm((c, 7, 6)),
    "group_norm": lambda c: nn.GroupNorm(c, c),
    "max_pool": lambda c: nn.MaxPool2d(2),
    "max_pool with overlap": lambda c: nn.MaxPool2d(3, stride=2, padding=1),
    "avg_pool": lambda c: nn.AvgPool2d(2),
    "avg_pool with overlap": lambda c: nn.AvgPool2d((3, 2), stride=1, padding=1, count_include_pad=False),
    "adaptive_avg_pool": lambda c: nn.AdaptiveAvgPool2d(1),
    "flatten": lambda c: nn.Flatten(),
    "add": lambda c: Sum(nn.Conv2d(c, c, 3, padding=1)),
}


def head(layer: nn.Module, *before: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """before -> layer -> a linear classifier of three classes."""
    body = nn.Sequential(*before, layer, nn.Flatten()).double().eval()
    for norm in body.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.train()
    features = copy.deepcopy(body)(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    net = nn.Sequential(body, nn.Linear(features, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def case(name: str, channels: int, images: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A net with the layer behind another one, so that its input has a tangent and wants a gradient."""
    torch.manual_seed(0)
    if images:
        return head(IMAGES[name](channels), nn.Conv2d(2, channels, 3, padding=1), shape=(2, 7, 6)), (2, 7, 6)
    return head(FEATURES[name](channels), nn.Linear(5, channels), shape=(5,)), (5,)


def episodes_of(shape: tuple[int, ...], samples: int, loss: str = "cross_entropy", tasks: int = 2) -> mf.Episodes:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tasks, samples, *shape, dtype=torch.float64, generator=g)
    y = torch.randint(3, (tasks, samples), generator=g)
    if loss == "mse":
        y = torch.randn(tasks, samples, 3, dtype=torch.float64, generator=g)
    return mf.Episodes(x, y, x, y)


on_simt = pytest.mark.skipif(bool(_native.missing("simt")), reason=_native.missing("simt"))
CASES = [(n, False) for n in FEATURES] + [(n, True) for n in IMAGES]


# The emulator is slow: it gets fewer channels and one set of samples.
SIZES = [pytest.param("cpu", *case, c, marks=kernels_of("cpu")) for case in CASES for c in (1, 13, 16, 33)]
SIZES += [pytest.param("simt", n, i, c, marks=kernels_of("simt")) for n, i in CASES for c in (1, 13 if i else 33)]


@pytest.mark.parametrize(("backend", "name", "images", "channels"), SIZES)
def test_four_functions_in_float64(backend: str, name: str, images: bool, channels: int) -> None:
    model, shape = case(name, channels, images)
    for samples, loss in ((4, "cross_entropy"), (11, "mse"))[: 1 if backend == "simt" else 2]:
        e = episodes_of(shape, samples, loss)
        found, _ = four_functions.native(model, e, loss, backend=backend)
        wanted = four_functions.plain(model, e, loss)
        for what in four_functions.NAMES:
            assert relative_error(found[what], wanted[what]) < BAR, (what, samples)


def the_same_in_every_order(model: nn.Module, e: mf.Episodes) -> None:
    """The same bits whichever thread and block comes first, on memory that starts as NaN, and the right numbers."""

    def results() -> list[Tensor]:
        found, _ = four_functions.native(model, e, "cross_entropy", backend="simt")
        return [found[what] for what in four_functions.NAMES]

    with poisoned():
        found = in_every_order("simt", results)
    wanted = four_functions.plain(model, e, "cross_entropy")
    for what, one in zip(four_functions.NAMES, found, strict=True):
        assert relative_error(one, wanted[what]) <= BAR, what


@on_simt
@pytest.mark.parametrize(("name", "images"), CASES)
def test_the_same_bits_in_every_order(name: str, images: bool) -> None:
    model, shape = case(name, 3, images)
    the_same_in_every_order(model, episodes_of(shape, 3))


@on_simt
@pytest.mark.parametrize("norm", [(nn.BatchNorm2d(2), nn.ReLU()), (nn.BatchNorm2d(2, affine=False),)])
def test_the_same_bits_in_every_order_of_a_norm_of_several_blocks(norm: tuple[nn.Module, ...]) -> None:
    """From 1,024 pixels on a batch norm is reduced in parts."""
    torch.manual_seed(0)
    layer = nn.Sequential(*norm, nn.AdaptiveAvgPool2d(1))
    model = head(layer, nn.Conv2d(1, 2, 1), shape=(1, 16, 33))
    the_same_in_every_order(model, episodes_of((1, 16, 33), 2, tasks=1))


@on_cpu_and_simt
@pytest.mark.parametrize(("name", "images"), CASES)
def test_layers_that_come_first(name: str, images: bool, backend: str) -> None:
    """At the input there is no tangent and no gradient to give."""
    torch.manual_seed(0)
    shape = (2, 7, 6) if images else (5,)
    layer = IMAGES[name](2) if images else FEATURES[name](5)
    model, e = head(layer, shape=shape), episodes_of(shape, 5)
    found, _ = four_functions.native(model, e, "cross_entropy", backend=backend)
    wanted = four_functions.plain(model, e, "cross_entropy")
    for what in four_functions.NAMES:
        assert relative_error(found[what], wanted[what]) < BAR, what


@on_cpu_and_simt
@pytest.mark.parametrize("channels", [1, 3, 8, 16])
def test_a_padded_convolution_of_one_pixel(channels: int, backend: str) -> None:
    """The network's own input has no border, though it looks like features."""
    torch.manual_seed(0)
    model = head(nn.Conv2d(channels, 4, 3, padding=1), nn.Identity(), shape=(channels, 1, 1))
    e = episodes_of((channels, 1, 1), 5)
    found, _ = four_functions.native(model, e, "cross_entropy", backend=backend)
    wanted = four_functions.plain(model, e, "cross_entropy")
    for what in four_functions.NAMES:
        assert relative_error(found[what], wanted[what]) < BAR, what


# Where a rounding flips no decision, and no group of one element makes the exact result a difference of equal numbers.
SMOOTH = [
    (n, i)
    for n, i in CASES
    if not any(word in n for word in ("relu", "elu", "max_pool", "softplus")) and (n, i) != ("group_norm", True)
]


@on_cpu_and_simt
@pytest.mark.parametrize(("name", "images"), SMOOTH)
def test_float32_errs_at_most_twice_as_much_as_torch(name: str, images: bool, backend: str) -> None:
    model, shape = case(name, 13 if backend == "cpu" or not images else 3, images)
    e = episodes_of(shape, 7)
    exact = four_functions.plain(model, e, "cross_entropy")
    single, e32 = copy.deepcopy(model).float(), e.to(dtype=torch.float32)
    found, _ = four_functions.native(single, e32, "cross_entropy", backend=backend)
    torchs = four_functions.plain(single, e32, "cross_entropy")
    for what in four_functions.NAMES:
        error, allowed = (relative_error(r[what].double(), exact[what]) for r in (found, torchs))
        assert error < 2 * allowed + 1e-6, what


@needs_kernels
def test_every_kind_of_layer_is_among_these() -> None:
    kinds = set()
    for name, images in CASES:
        model, shape = case(name, 4, images)
        _, lowered = four_functions.native(model, episodes_of(shape, 3), "cross_entropy")
        kinds |= {layer.kind for layer in lowered.layers}
    assert kinds == set(Kind)
