"""Networks by seed: random chains and residual graphs of everything that is lowered, in every form it is written."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]

_MODULES: tuple[Callable[[random.Random], nn.Module], ...] = (
    lambda r: nn.ReLU(),
    lambda r: nn.LeakyReLU(r.choice((0.01, 0.3, -0.2))),
    lambda r: nn.ELU(r.choice((1.0, 0.5))),
    lambda r: nn.Tanh(),
    lambda r: nn.Sigmoid(),
    lambda r: nn.GELU(),
    lambda r: nn.GELU(approximate="tanh"),
    lambda r: nn.SiLU(),
    lambda r: nn.Softplus(r.choice((1.0, 2.5)), r.choice((20.0, 0.5))),
)
_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.relu,
    lambda x: x.relu(),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.elu(x, alpha=0.7),
    torch.tanh,
    lambda x: x.tanh(),
    torch.sigmoid,
    lambda x: x.sigmoid(),
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softplus(x, beta=1.5),
    lambda x: F.dropout(x, 0.5, training=False),
)
_FLATTENS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.flatten(x, 1),
    lambda x: x.flatten(1),
    lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: x.view(-1, x.size(1) * x.shape[2] * x.shape[3]),
)
_ADDS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    operator.add,
    torch.add,
    lambda x, y: x.add(y),
    lambda x, y: torch.add(x, y, alpha=1),
)


class RandomNet(nn.Module):
    """Runs its steps in order; each is (what, index of a module or a function, indices of earlier values)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.functions: list[Callable[..., Tensor]] = []
        self.steps: list[tuple[str, int, tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for what, index, sources in self.steps:
            inputs = [values[i] for i in sources]
            if what == "module":
                values.append(self.layers[index](*inputs))
            elif what == "function":
                values.append(self.functions[index](*inputs))
            else:
                values.append(getattr(self, what)(self.layers[index], *inputs))
        return values[-1]

    def linear(self, m: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, m.weight, m.bias)

    def conv2d(self, m: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, m.weight, m.bias, m.stride, padding=m.padding)

    def layer_norm(self, m: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], m.weight, m.bias, m.eps)

    def group_norm(self, m: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.group_norm(x, m.num_groups, weight=m.weight, bias=m.bias)

    def batch_norm(self, m: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, m.weight, m.bias, training=True)


class _Builder:
    """Appends steps to a net, keeping track of the shapes of its values."""

    def __init__(self, r: random.Random, shape: Shape, chain: bool) -> None:
        self.r = r
        self.chain = chain  # of modules, each with the last one's output
        self.net = RandomNet()
        self.shapes: list[Shape] = [shape]

    @property
    def shape(self) -> Shape:
        return self.shapes[-1]

    def module(self, m: nn.Module, output: Shape, form: str = "module") -> None:
        self.net.layers.append(m)
        functional = not self.chain and self.r.random() < 0.4
        self._step(form if functional else "module", len(self.net.layers) - 1, output)

    def function(self, f: Callable[..., Tensor], output: Shape, *sources: int) -> None:
        self.net.functions.append(f)
        self._step("function", len(self.net.functions) - 1, output, *sources)

    def _step(self, what: str, index: int, output: Shape, *sources: int) -> None:
        self.net.steps.append((what, index, sources or (len(self.shapes) - 1,)))
        self.shapes.append(output)

    def activation(self) -> None:
        kind = self.r.random()
        if kind < 0.5:
            self.module(self.r.choice(_MODULES)(self.r), self.shape)
        elif kind < 0.9 and not self.chain:
            self.function(self.r.choice(_FUNCTIONS), self.shape)
        elif self.overwritable():
            self.module(nn.LeakyReLU(0.1, inplace=True), self.shape)
            self.shapes[-2] = ()
        else:
            self.module(self.r.choice((nn.Identity(), nn.Dropout(0.0))), self.shape)

    def overwritable(self) -> bool:
        """Whether the last value is of a layer that does not need its output for its gradient."""
        if not self.net.steps or self.net.steps[-1][0] == "function":
            return False
        return isinstance(self.net.layers[self.net.steps[-1][1]], (nn.Linear, nn.Conv2d))

    def linear(self, features: int) -> None:
        bias = self.r.random() < 0.8
        self.module(nn.Linear(self.shape[0], features, bias=bias), (features,), "linear")

    def norm(self) -> None:
        shape, affine = self.shape, self.r.random() < 0.7
        kind = self.r.choice(("batch", "batch", "layer", "group"))
        if kind == "batch":
            cls = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
            self.module(cls(shape[0], eps=1e-3, affine=affine), shape, "batch_norm")
        elif kind == "layer":
            self.module(nn.LayerNorm(shape, elementwise_affine=affine), shape, "layer_norm")
        else:
            # Several channels a group: a group of one feature would always be zero.
            divisors = [g for g in range(1, shape[0] + 1) if shape[0] % g == 0 and (len(shape) == 3 or g < shape[0])]
            if not divisors:
                return
            self.module(nn.GroupNorm(self.r.choice(divisors), shape[0], affine=affine), shape, "group_norm")

    def conv(self, channels: int, keep: bool = False) -> None:
        c, h, w = self.shape
        if keep:
            m = nn.Conv2d(c, channels, self.r.choice((1, 3)), padding="same", bias=self.r.random() < 0.7)
        else:
            kernel = (self.r.randint(1, min(4, h)), self.r.randint(1, min(5, w)))
            stride = (self.r.randint(1, 2), self.r.randint(1, 3))
            padding = (self.r.randint(0, 2), self.r.randint(0, 1))
            m = nn.Conv2d(c, channels, kernel, stride, padding, bias=self.r.random() < 0.7)
        self.module(m, self._output(m), "conv2d")

    def pool(self) -> None:
        _, h, w = self.shape
        kernel = (self.r.randint(1, min(3, h)), self.r.randint(1, min(3, w)))
        stride = self.r.choice((None, 1, 2, (2, 1)))
        padding = (self.r.randint(0, kernel[0] // 2), self.r.randint(0, kernel[1] // 2))
        kind = self.r.choice((0, 1, 4)) if self.chain else self.r.randrange(5)
        m: nn.Module
        if kind == 0:
            m = nn.MaxPool2d(kernel, stride, padding)
        elif kind == 1:
            m = nn.AvgPool2d(kernel, stride, padding, count_include_pad=self.r.random() < 0.5)
        elif kind == 2:
            self.function(lambda x: F.max_pool2d(x, kernel, 1, padding), self._output(nn.MaxPool2d(kernel, 1, padding)))
            return
        elif kind == 3:
            self.function(lambda x: F.avg_pool2d(x, kernel), self._output(nn.AvgPool2d(kernel)))
            return
        else:
            m = nn.AdaptiveAvgPool2d(1)
        self.module(m, self._output(m))

    def flatten(self) -> None:
        c, h, w = self.shape
        if self.chain or self.r.random() < 0.3:
            self.module(nn.Flatten(), (c * h * w,))
        else:
            self.function(self.r.choice(_FLATTENS), (c * h * w,))

    def skip(self) -> None:
        """Add the last value and an earlier one of its shape, or itself."""
        same = [i for i, s in enumerate(self.shapes) if s == self.shape]
        other = self.r.choice(same)
        self.function(self.r.choice(_ADDS), self.shape, *self.r.sample((len(self.shapes) - 1, other), 2))

    def residual(self) -> None:
        """A branch and back, as the residual networks have it."""
        start, shape = len(self.shapes) - 1, self.shape
        if len(shape) == 3:
            self.conv(self.r.randint(1, 6), keep=True)
            self.norm()
            self.activation()
            self.conv(shape[0], keep=True)
        else:
            self.linear(self.r.randint(1, 9))
            self.activation()
            self.linear(shape[0])
        end = len(self.shapes) - 1
        in_place = self.r.random() < 0.3
        self.function(operator.iadd if in_place else self.r.choice(_ADDS), shape, end, start)
        if in_place:
            self.shapes[end] = ()  # nothing else may read it

    def _output(self, m: nn.Module) -> Shape:
        return tuple(m(torch.zeros(2, *self.shape)).shape[1:])


def random_net(seed: int) -> tuple[nn.Module, Shape]:
    """A float32 network that lowers under ``batch_norm="batch"``, and the shape of its samples; the same for a seed.

    A third are plain chains in nested ``nn.Sequential``. Affine weights of norms are moved off 1 and 0; some networks
    have frozen parameters, unused layers, or inputs that are reshaped first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drawn_net(random.Random(seed))


def drawn_net(r: random.Random, smallest: int = 5) -> tuple[nn.Module, Shape]:
    """The same of any source of choices, images from so many pixels wide; the weights are of torch's generator."""
    chain = r.random() < 0.35
    b, shape = _images(r, chain, smallest) if r.random() < 0.6 else _features(r, chain)
    net = _nested(b.net, r) if chain else b.net
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    if r.random() < 0.25:
        parameters = list(net.parameters())
        for p in r.sample(parameters, r.randrange(len(parameters))):
            p.requires_grad_(False)
    return net, shape


def _features(r: random.Random, chain: bool) -> tuple[_Builder, Shape]:
    shape: Shape = (r.randint(1, 17),)
    b = _Builder(r, shape, chain)
    if r.random() < 0.2:
        shape = (1, shape[0], 1)
        b.shapes = [shape]
        b.flatten()
    b.linear(r.randint(1, 19))
    _several(b, (b.norm, b.activation, b.activation, b.linear))
    _head(b)
    return b, shape


def _images(r: random.Random, chain: bool, smallest: int) -> tuple[_Builder, Shape]:
    image = (r.randint(1, 4), r.randint(smallest, 12), r.randint(smallest, 12))
    shape: Shape = image
    b = _Builder(r, shape, chain)
    if r.random() < 0.25:
        shape = (image[0] * image[1] * image[2],)
        b.shapes = [shape]
        b.module(nn.Unflatten(1, image), image)
    elif r.random() < 0.15 and not chain:
        image = (1, *image[1:])
        shape = image[1:]
        b.shapes = [shape]
        b.function(lambda x: x.unsqueeze(1), image)
    b.conv(r.randint(1, 9))
    _several(b, (b.norm, b.activation, b.activation, b.conv, b.pool))
    if len(b.shape) == 3:
        b.flatten()
    if r.random() < 0.3:
        b.linear(r.randint(1, 9))
        b.activation()
    _head(b)
    return b, shape


def _several(b: _Builder, moves: tuple[Callable[..., None], ...]) -> None:
    if not b.chain:
        moves = (*moves, b.skip, b.residual)
    for _ in range(b.r.randint(1, 8)):
        move: Callable[..., Any] = b.r.choice(moves)
        move(*((b.r.randint(1, 11),) if move in (b.linear, b.conv) else ()))


def _head(b: _Builder) -> None:
    if not b.chain and b.r.random() < 0.2:
        b.net.layers.append(nn.Linear(3, 2))  # never called
    if b.r.random() < 0.9:
        b.linear(b.r.randint(1, 7))


def _nested(net: RandomNet, r: random.Random) -> nn.Module:
    """A chain as Sequentials in Sequentials."""
    modules = list(net.layers)
    cut = r.randint(0, len(modules))
    return nn.Sequential(nn.Sequential(*modules[:cut]), nn.Sequential(nn.Sequential(*modules[cut:])))
