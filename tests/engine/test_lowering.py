"""What is lowered computes what the module computes: replayed from the flat vector, for many networks."""

from __future__ import annotations

import operator
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast as mf
from metafast.engine.batch_norm import policy
from metafast.engine.layout import Layout
from metafast.engine.lowering import Kind, Lowered, lower
from metafast.engine.lowering.lowered import elements
from tests.engine.interpret import flat_parameters, interpret
from tests.engine.random_nets import RandomNet, random_net
from tests.nets import NETS, build

SEEDS = range(60)


class Net(nn.Module):
    """A forward of one's own, by a function of the module and x."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def check(model: nn.Module, shape: tuple[int, ...], batch_norm: str = "batch", samples: int = 5) -> Lowered:
    """Lower and compare outputs and gradients with the module's own, in float64; everything in ``lowered`` is sane."""
    lowered = lower(model, shape, batch_norm)
    model = model.double()
    x = torch.randn(samples, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with policy(model, batch_norm):
        wanted = model(x)
    flat = flat_parameters(model, lowered)
    found = interpret(lowered, flat, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    layout = Layout.of(model)
    cotangent = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    gradients = [
        torch.autograd.grad((y * cotangent).sum() + 0 * flat.sum(), layout.parameters(model), retain_graph=True)
        for y in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    assert lowered.adapting == sum(layout.sizes) and lowered.length == flat.numel()
    assert lowered.output == wanted.shape[1:] and elements(lowered.input) == elements(shape)
    shapes = [lowered.input, *(layer.output for layer in lowered.layers)]
    for i, layer in enumerate(lowered.layers):
        assert all(0 <= source <= i for source in layer.inputs)
        assert len(layer.inputs) == (2 if layer.kind is Kind.add else 1)
        assert layer.channels == layer.output[0]
        assert (layer.weight >= 0) == (layer.kind in (Kind.linear, Kind.conv2d) or layer.parameters > 0)
        if layer.kind is Kind.linear:
            assert layer.flops == 2 * layer.channels * shapes[layer.inputs[0]][0]
    return lowered


def kinds(lowered: Lowered) -> list[str]:
    return [layer.kind.name for layer in lowered.layers]


@pytest.mark.parametrize("name", [name for name in NETS if name != "tied"])
def test_the_nets_of_the_exactness_tests(name: str) -> None:
    check(build(name), (1, 16, 16) if name == "conv4" else (6,))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mf.models.MLP(1, (40, 40), 1), (1,)),
        (mf.models.MLP(3, (), 2), (3,)),
        *((mf.models.MLP(3, (5, 4), 2, activation=name), (3,)) for name in mf.models.ACTIVATIONS),
        (mf.models.Conv4(5, width=7, in_channels=3, image_size=20), (3, 20, 20)),
        (mf.models.Conv4Encoder(width=4, image_size=17, blocks=3), (1, 17, 17)),
        (mf.models.OmniglotFC(5), (1, 28, 28)),
    ],
)
def test_the_models(model: nn.Module, shape: tuple[int, ...]) -> None:
    check(model, shape)


def test_random_networks_of_everything() -> None:
    """Chains and residual graphs in all forms; every kind must come up, or the test would prove little."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        net, shape = random_net(seed)
        lowered = check(net, shape)
        seen.update(kinds(lowered))
        seen["frozen"] += bool(lowered.constants)
        seen["sequential"] += not isinstance(net, RandomNet)
    assert min(seen[kind.name] for kind in Kind) > 0 and seen["frozen"] > 5 and seen["sequential"] > 5


def test_a_random_network_is_the_same_for_a_seed() -> None:
    (first, shape), (second, again) = random_net(3), random_net(3)
    x = torch.randn(4, *shape)
    assert shape == again and torch.equal(first(x), second(x))


def test_kinds_are_those_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "csrc/engine/program.h").read_text()
    body = re.search(r"enum class Kind : int32_t \{(.*?)\}", header, re.S)
    assert body is not None
    names = re.findall(r"^\s*(\w+)(?: = 1)?,", body[1], re.M)
    # What follows there the extension makes of these itself.
    assert [kind.name for kind in Kind] == names[: len(Kind)] and list(Kind) == list(range(1, len(Kind) + 1))


def block(m: nn.Module, x: Tensor) -> Tensor:
    """A basic block of a ResNet, with its in-place habits."""
    out = m.relu(m.bn1(m.conv1(x)))
    out = m.bn2(m.conv2(out))
    out += m.down(x)
    return m.head(torch.flatten(m.pool(m.relu(out)), 1))


def resnet() -> Net:
    return Net(
        block,
        conv1=nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(4),
        down=nn.Conv2d(2, 4, 1, stride=2),
        relu=nn.ReLU(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(4, 3),
    )


def test_a_residual_block() -> None:
    lowered = check(resnet(), (2, 9, 7))
    branch, tail = ["conv2d", "batch_norm"], ["add", "relu", "avg_pool", "flatten", "linear"]
    assert kinds(lowered) == [*branch, "relu", *branch, "conv2d", *tail]
    assert [layer.inputs for layer in lowered.layers][4:8] == [(4,), (0,), (5, 6), (7,)]
    assert lowered.layers[0].flops == 2 * 4 * 2 * 9 * 5 * 4


def by_unpacking(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = (x := m.fc(x).view(-1, 1, 2, 3)).shape
    return x.view(n, c * h * w)


FORMS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "relu": (lambda m, x: F.relu(m.fc(x)), ["relu"]),
    "relu in place": (lambda m, x: F.relu(m.fc(x), True), ["relu"]),
    "relu_": (lambda m, x: m.fc(x).relu_(), ["relu"]),
    "torch.relu_": (lambda m, x: torch.relu_(m.fc(x)), ["relu"]),
    "tanh_": (lambda m, x: torch.tanh_(m.fc(x)), ["tanh"]),
    "F.tanh": (lambda m, x: F.tanh(m.fc(x)), ["tanh"]),
    "sigmoid_": (lambda m, x: m.fc(x).sigmoid_(), ["sigmoid"]),
    "leaky_relu_": (lambda m, x: F.leaky_relu_(m.fc(x), 0.3), ["leaky_relu"]),
    "leaky_relu": (lambda m, x: F.leaky_relu(m.fc(x), negative_slope=-0.5), ["leaky_relu"]),
    "elu_": (lambda m, x: F.elu_(m.fc(x), 0.3), ["elu"]),
    "silu": (lambda m, x: F.silu(m.fc(x), inplace=True), ["silu"]),
    "gelu": (lambda m, x: F.gelu(m.fc(x), approximate="none"), ["gelu"]),
    "softplus": (lambda m, x: F.softplus(m.fc(x), 0.5, threshold=2), ["softplus"]),
    "iadd": (lambda m, x: operator.iadd(m.fc(x), x), ["add"]),
    "add_": (lambda m, x: m.fc(x).add_(x), ["add"]),
    "add to itself": (lambda m, x: (lambda h: h + h)(m.fc(x)), ["add"]),
    "layer_norm": (lambda m, x: F.layer_norm(m.fc(x), x.size()[1:], eps=0.1), ["layer_norm"]),
    "layer_norm 2": (lambda m, x: F.layer_norm(m.fc(x), (6,)), ["layer_norm"]),
    "batch_norm": (lambda m, x: F.batch_norm(m.fc(x), None, None, training=True), ["batch_norm"]),
    "keyword": (lambda m, x: F.relu(input=m.fc(input=x)), ["relu"]),
    "dropout": (lambda m, x: F.dropout(m.fc(x), 0.0), []),
    "view": (lambda m, x: m.fc(x).view(x.size(0), -1), []),
    "view by size": (lambda m, x: m.fc(x).view(x.size()), []),
    "view by number": (lambda m, x: m.fc(x).view(-1, 6), []),
    "view of features": (lambda m, x: m.fc(x).view(-1, x.size(1) // 2 * 2), []),
    "reshape": (lambda m, x: torch.reshape(m.fc(x), (x.shape[0], -1)), []),
    "there and back": (lambda m, x: m.fc(x).view(-1, 2, 3).contiguous().flatten(1), []),
    "squeeze": (lambda m, x: m.fc(x).unsqueeze(2).squeeze(-1), []),
    "view by unpacking": (by_unpacking, []),
    "dead": (lambda m, x: (m.other(x), m.fc(x))[1], []),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_writing(name: str) -> None:
    function, expected = FORMS[name]
    net = Net(function, fc=nn.Linear(6, 6), other=nn.Bilinear(2, 2, 2) if name != "dead" else nn.Linear(6, 2))
    assert kinds(check(net, (6,))) == ["linear", *expected]


@pytest.mark.parametrize(
    "m",
    [
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(2, 0)),
        nn.Conv2d(2, 3, (3, 5), padding="same", bias=False),
        nn.Conv2d(2, 3, 4, stride=3, padding="valid"),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), stride=(3, 1)),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((5, 1)),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.BatchNorm2d(2, eps=0.1, affine=False),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.LayerNorm((2, 7, 9)),
        nn.LayerNorm((2, 7, 9), elementwise_affine=False, eps=0.2),
        nn.GroupNorm(1, 2, affine=False),
        nn.Dropout(0.0),
        nn.Dropout2d(0.7).eval(),
        nn.Identity(),
        nn.Unflatten(1, (1, 2)),
    ],
    ids=str,
)
def test_layers_on_images(m: nn.Module) -> None:
    check(nn.Sequential(nn.Conv2d(2, 2, 1), m, nn.Flatten()), (2, 7, 9))


def test_settings_of_a_layer_arrive() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, (3, 2), (2, 1), (1, 0), bias=False),
        nn.GroupNorm(3, 6, eps=1e-3),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d((2, 1), (1, 2), (1, 0), count_include_pad=False),
        nn.ELU(0.5),
        nn.Softplus(2.0, 7.0),
        nn.GELU("tanh"),
        nn.Flatten(),
        nn.Linear(90, 4),
    )
    lowered = check(model, (2, 8, 7))
    conv, group, leaky, pool, elu, soft, _, flat, linear = lowered.layers
    assert (conv.kernel, conv.stride, conv.padding, conv.bias, conv.channels) == ((3, 2), (2, 1), (1, 0), False, 6)
    assert conv.output == (6, 4, 6) and (conv.weight, conv.bias_offset, conv.parameters) == (0, -1, 72)
    assert (group.groups, group.number, group.bias, group.weight, group.bias_offset) == (3, 1e-3, True, 72, 78)
    assert (leaky.number, elu.number, soft.number, soft.number1) == (0.2, 0.5, 2.0, 7.0)
    assert (pool.kernel, pool.stride, pool.padding, pool.bias) == ((2, 1), (1, 2), (1, 0), False)
    assert flat.output == (90,) and (linear.weight, linear.bias_offset) == (84, 84 + 360)
    integers, floats = lowered.descriptor("mse")
    assert integers[:7] == (2, 2, 8, 7, 448, 0, 9) and len(integers) == 7 + 9 * 16
    assert integers[7:23] == (2, 0, -1, 6, 3, 2, 2, 1, 1, 0, 1, 0, 0, -1, 0, 0)
    assert integers[-16:] == (1, 8, -1, 4, 0, 0, 0, 0, 0, 0, 1, 1, 84, 444, 0, 0)
    assert floats[2:6] == (1e-3, 0.0, 0.2, 0.0) and len(floats) == 18


def test_the_descriptor_of_features_and_of_an_addition() -> None:
    lowered = check(build("residual"), (6,))
    integers, _ = lowered.descriptor("cross_entropy")
    assert integers[:7] == (1, 6, 1, 1, lowered.adapting, 0, 9)
    adds = [integers[i : i + 3] for i in range(7, len(integers), 16) if integers[i] == Kind.add]
    assert adds == [(18, 2, 5), (18, 6, 7)]


def test_frozen_parameters_follow_and_unused_ones_keep_their_place() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), unused=nn.Linear(3, 2), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    net.a.weight.requires_grad_(False)
    net.b.bias.requires_grad_(False)
    net.register_parameter("idle", nn.Parameter(torch.zeros(7), requires_grad=False))
    lowered = check(net, (4,))
    a, _, b = lowered.layers
    assert lowered.adapting == 8 + 5 + 10 and lowered.constants == ("a.weight", "b.bias")
    assert lowered.constant_elements == 22 and lowered.descriptor("mse")[0][4:6] == (23, 22)
    assert (a.weight, a.bias_offset, b.weight, b.bias_offset) == (23, 8, 13, 43)


@pytest.mark.parametrize(
    ("model", "shape", "seen"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (1, 3, 4), (12,)),
        (nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 2, 2), nn.Flatten()), (12,), (1, 3, 4)),
        (Net(lambda m, x: m.c(x.unsqueeze(1)).flatten(1), c=nn.Conv2d(1, 2, 2)), (3, 4), (1, 3, 4)),
        (Net(lambda m, x: m.c(x.view(-1, 1, 4, 3)).flatten(1), c=nn.Conv2d(1, 2, 2)), (2, 3, 2), (1, 4, 3)),
    ],
)
def test_a_reshape_of_the_input_is_another_view_of_it(
    model: nn.Module, shape: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    lowered = check(model, shape)
    assert lowered.input == seen and lowered.layers[0].kind is not Kind.flatten


def both(m: nn.Module, x: Tensor) -> Tensor:
    return m.direct(x.flatten(1)) + m.head(m.conv(x.view(-1, 1, 2, 3)).flatten(1))


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_an_input_taken_as_image_and_as_features(shape: tuple[int, ...]) -> None:
    net = Net(both, direct=nn.Linear(6, 2), conv=nn.Conv2d(1, 2, 1), head=nn.Linear(12, 2))
    lowered = check(net, shape)
    assert lowered.input == (1, 2, 3)
    assert kinds(lowered) == ["flatten", "linear", "conv2d", "flatten", "linear", "add"]


def test_arguments_with_defaults_have_them() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, *rest: Tensor, scale: bool = False) -> Tensor:
            y: Tensor = self.fc(x)
            return y if mask is None and not scale else y + mask

    assert kinds(check(Optional(), (3,))) == ["linear"]


def test_nothing_of_the_module_or_the_generators_changes() -> None:
    model = resnet()
    model.eval()
    model.bn1.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = {m: dict(vars(m)) for m in model.modules()}
    state = torch.get_rng_state()
    first = lower(model, (2, 9, 7), "batch")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for m, table in tables.items():
        assert vars(m).keys() == table.keys() and all(vars(m)[key] is value for key, value in table.items())
    assert lower(model, (2, 9, 7), "batch") == first


@pytest.mark.parametrize(
    "ambient",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_what_the_caller_has_switched_on_does_not_matter(ambient: Callable[[], object]) -> None:
    model = mf.models.Conv4(3, width=4)
    wanted = lower(model, (1, 28, 28), "batch")
    with ambient():  # type: ignore[attr-defined]
        assert lower(model, (1, 28, 28), "batch") == wanted


def test_other_threads_run_modules_meanwhile() -> None:
    """torch.fx replaces Module.__call__ for all threads while it traces."""
    model, stop, failures = mf.models.MLP(3, (5, 4), 2), threading.Event(), []

    def run() -> None:
        x = torch.ones(2, 3)
        wanted = model(x)
        while not stop.is_set():
            try:
                if not torch.equal(model(x), wanted):
                    failures.append("other numbers")
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    lowering = [threading.Thread(target=lambda: [lower(model, (3,), "batch") for _ in range(10)]) for _ in range(2)]
    for thread in threads + lowering:
        thread.start()
    for thread in lowering:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
