"""What is not lowered says so, by the layer's name and the reason."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import metafast as mf
from metafast.engine.lowering import NotLowered, lower
from tests.backends import native as needs_kernels
from tests.engine.test_lowering import Net
from tests.nets import build


def fc(function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> Net:
    """A net of features (6,) with a linear layer ``fc`` of six outputs."""
    return Net(function, fc=nn.Linear(6, 6), **modules)


def refused(model: nn.Module, shape: tuple[int, ...], reason: str, batch_norm: str = "batch") -> None:
    with pytest.raises(NotLowered) as caught:
        lower(model, shape, batch_norm)
    assert str(caught.value) == caught.value.reason and "\n" not in caught.value.reason
    assert reason in caught.value.reason


ON_IMAGES: list[tuple[nn.Module, str]] = [
    (nn.Conv2d(2, 2, 3, groups=2), "layer '1' (Conv2d) has groups=2"),
    (nn.Conv2d(2, 2, 3, dilation=2), "layer '1' (Conv2d) has dilation=(2, 2)"),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "layer '1' (Conv2d) has padding_mode='reflect'"),
    (nn.Conv2d(2, 2, (3, 2), padding="same"), "layer '1' (Conv2d) pads unevenly"),
    (nn.Conv2d(3, 2, 3), "layer '1' (Conv2d) does not take samples of shape (2, 7, 7): it has 3 input channels"),
    (nn.Conv2d(2, 2, 9), "layer '1' (Conv2d) does not take samples of shape (2, 7, 7): they are smaller"),
    (nn.Conv2d(2, 2, 1, dtype=torch.float64), "layer '1' (Conv2d) has the parameter '1.weight' of torch.float64"),
    (nn.ConvTranspose2d(2, 2, 3), "layer '1' (ConvTranspose2d) has no row"),
    (nn.Conv1d(7, 7, 1), "layer '1' (Conv1d) has no row"),
    (nn.MaxPool2d(2, ceil_mode=True), "layer '1' (MaxPool2d) has ceil_mode=True"),
    (nn.MaxPool2d(2, dilation=2), "layer '1' (MaxPool2d) has dilation=(2, 2)"),
    (nn.MaxPool2d(2, return_indices=True), "layer '1' (MaxPool2d) has return_indices=True"),
    (nn.MaxPool2d(2, padding=2), "layer '1' (MaxPool2d) has the padding (2, 2), more than half of its kernel"),
    (nn.AvgPool2d(2, ceil_mode=True), "layer '1' (AvgPool2d) has ceil_mode=True"),
    (nn.AvgPool2d(2, divisor_override=3), "layer '1' (AvgPool2d) has divisor_override=3"),
    (nn.AdaptiveAvgPool2d(2), "layer '1' (AdaptiveAvgPool2d) has output_size=(2, 2)"),
    (nn.AdaptiveAvgPool2d((1, None)), "layer '1' (AdaptiveAvgPool2d) has the output_size None"),
    (nn.AdaptiveMaxPool2d(1), "layer '1' (AdaptiveMaxPool2d) has no row"),
    (nn.InstanceNorm2d(2), "layer '1' (InstanceNorm2d) has no row"),
    (nn.SyncBatchNorm(2), "layer '1' (SyncBatchNorm) has no row"),
    (nn.BatchNorm1d(2), "layer '1' (BatchNorm1d) takes features here"),
    (nn.BatchNorm2d(3), "layer '1' (BatchNorm2d) does not take samples of shape (2, 7, 7)"),
    (nn.LayerNorm(7), "layer '1' (LayerNorm) normalises over (7,)"),
    (nn.LayerNorm((2, 7, 7), bias=False), "layer '1' (LayerNorm) has a weight alone"),
    (nn.GroupNorm(2, 4), "layer '1' (GroupNorm) does not take samples of shape (2, 7, 7)"),
    (nn.Linear(7, 3), "layer '1' (Linear) takes features here, (N, D), got samples of shape (2, 7, 7)"),
    (nn.Dropout(0.5), "layer '1' (Dropout) is active"),
    (nn.Dropout2d(0.1), "layer '1' (Dropout2d) is active"),
    (nn.PReLU(), "layer '1' (PReLU) has no row"),
    (nn.Softmax(1), "layer '1' (Softmax) has no row"),
]


@pytest.mark.parametrize(("m", "reason"), ON_IMAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_layers_on_images(m: nn.Module, reason: str) -> None:
    refused(nn.Sequential(nn.Conv2d(2, 2, 1), m, nn.Flatten()), (2, 7, 7), reason)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Linear(4, 2), (5, 4), "layer 'Linear' (Linear) takes features here"),
        (nn.Linear(4, 2), (5,), "layer 'Linear' (Linear) does not take samples of shape (5,): it has 4 inputs"),
        (nn.Linear(4, 2), (), "layer 'Linear' (Linear) takes features here, (N, D), got samples of shape ()"),
        (nn.Conv2d(6, 2, 1), (6, 6), "layer 'Conv2d' (Conv2d) takes images here"),
        (nn.Conv2d(2, 2, 3), (2, 7, 7), "layer 'Conv2d' (Conv2d) is the last one and gives samples of shape (2, 5, 5)"),
        (nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3))), (6,), "layer '0' (Linear) is the last one"),
        (
            nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 1), nn.Flatten()),
            (6,),
            "layer '2' (Conv2d) takes samples of shape (6,) as (1, 2, 3), by '1'",
        ),
        (nn.Linear(2, 2).requires_grad_(False), (2,), "the model (Linear) has no parameters that require gradients"),
        (nn.Sequential(nn.ReLU()), (2,), "the model (Sequential) has no parameters that require gradients"),
        (nn.Linear(2, 2, device="meta"), (2,), "the model (Linear) has tensors without values"),
        (nn.LazyLinear(2), (2,), "the model (LazyLinear) has hooks"),
        (nn.DataParallel(nn.Linear(2, 2)), (2,), "layer 'DataParallel' (DataParallel) has no row"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)), (6,), "layer '0' (ReLU) writes in place"),
        (
            nn.Sequential(nn.Flatten(), nn.ELU(inplace=True), nn.Linear(6, 2)),
            (1, 2, 3),
            "layer '1' (ELU) writes in place",
        ),
        (nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU(inplace=True)), (6,), "fails in torch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_models(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    refused(model, shape, reason)


def in_place_and_used_again(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    return torch.relu_(h) + h


def in_place_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    h.view(-1, 2, 3).flatten(1).relu_()
    return h


def augmented_and_used_again(m: Any, x: Tensor) -> Tensor:
    h = before = m.fc(x)
    h += x
    return h + before


def augmented_input(m: Any, x: Tensor) -> Tensor:
    x += m.fc(x)
    return x


def doubled(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    h *= 2
    return h


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.fc(x)
    return m.other(h)


def in_half_precision(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.fc(x)


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(min=0)


def remembers(m: Any, x: Tensor) -> Tensor:
    m.features = m.fc(x)
    return m.features


def logs(m: Any, x: Tensor) -> Tensor:
    m.log.append(1)
    return m.fc(x)


def with_hook(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    h.retain_grad()
    return h


def twice_by_function(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.fc.weight), m.fc.weight)


def two_shapes(m: Any, x: Tensor) -> Tensor:
    return m.a(x.view(-1, 1, 2, 3)).flatten(1) + m.b(x.view(-1, 1, 3, 2)).flatten(1)


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "in place and used again": (in_place_and_used_again, "layer 'relu_' (relu_) writes in place"),
    "in place through a view": (in_place_through_a_view, "layer 'relu_' (Tensor.relu_) writes in place"),
    "augmented and used again": (augmented_and_used_again, "layer 'iadd' (iadd) writes in place"),
    "augmented input": (augmented_input, "layer 'iadd' (iadd) writes in place"),
    "doubled": (doubled, "layer 'imul' (imul) has no row"),
    "no_grad": (without_gradient, "layer 'fc' runs under no_grad"),
    "autocast": (in_half_precision, "layer 'fc' runs under no_grad, autocast"),
    "autograd.Function": (lambda m, x: Guided.apply(m.fc(x)), "layer 'relu' runs under no_grad"),
    "attribute": (remembers, "changes its own attributes"),
    "list": (logs, "changes its own attributes"),
    "gradient of a value": (with_hook, "layer 'retain_grad' (Tensor.retain_grad) has no row"),
    "frozen by forward": (lambda m, x: m.fc.requires_grad_(False)(x), "changes its own attributes"),
    "twice": (lambda m, x: m.fc(m.fc(x)), "layer 'fc' (Linear) is called more than once"),
    "twice by function": (twice_by_function, "layer 'linear_1' (linear) shares the parameter 'fc.weight' with layer"),
    "two shapes": (two_shapes, "layer 'b' (Conv2d) and others take the input's samples as of several shapes"),
    "isinstance": (lambda m, x: m.fc(x) if isinstance(x, Tensor) else x, "gives its input back"),
    "isinstance 2": (
        lambda m, x: m.fc(x) if isinstance(x, Tensor) else F.relu(m.fc(x)),
        "not what torch.fx sees of it: the outputs differ",
    ),
    "isinstance 3": (
        lambda m, x: m.missing if isinstance(x, Tensor) else m.fc(x),
        "the model (Net) fails in torch: 'Net' object has no attribute 'missing'",
    ),
    "data": (lambda m, x: m.fc(x) if x.sum() > 0 else x, "torch.fx cannot trace the model (Net): symbolically traced"),
    "samples": (lambda m, x: m.fc(x) if len(x) > 3 else x, "torch.fx cannot trace the model (Net)"),
    "buffer": (lambda m, x: m.fc(x) if m.flag else x, "torch.fx cannot trace the model (Net)"),
    "detach": (lambda m, x: m.fc(x.detach()), "layer 'detach' (Tensor.detach) has no row"),
    "data attribute": (lambda m, x: m.fc(x).data, "layer 'getattr_1' (getattr) reads 'data'"),
    "slice": (lambda m, x: m.fc(x)[:, :3], "layer 'getitem' (getitem) takes a part of a tensor"),
    "transpose": (lambda m, x: m.fc(x).t(), "layer 't' (Tensor.t) has no row"),
    "two by two": (lambda m, x: m.fc(x).view(2, -1), "layer 'view' (Tensor.view) reshapes across samples"),
    "all by three": (lambda m, x: m.fc(x).view(-1, 3), "layer 'view' (Tensor.view) reshapes across samples"),
    "half the samples": (lambda m, x: m.fc(x).view(x.size(0) // 2, -1), "layer 'floordiv' (floordiv) has no row"),
    "flatten(0)": (lambda m, x: m.fc(x).flatten(), "layer 'flatten' (Tensor.flatten) reshapes across samples"),
    "squeeze(0)": (lambda m, x: m.fc(x).squeeze(0), "layer 'squeeze' (Tensor.squeeze) reshapes across samples"),
    "squeeze()": (lambda m, x: m.fc(x).squeeze(), "layer 'squeeze' (Tensor.squeeze) is called as its row"),
    "a number each": (lambda m, x: m.other(x).squeeze(-1), "layer 'other' (Linear) is the last one and gives samples"),
    "number": (lambda m, x: m.fc(x) + 1, "layer 'add' (add) adds something else"),
    "parameter": (lambda m, x: m.fc(x) + m.fc.bias, "layer 'add' (add) adds something else"),
    "buffer added": (lambda m, x: m.fc(x) + m.flag, "layer 'add' (add) adds something else"),
    "random": (lambda m, x: m.fc(x) + torch.rand(6), "layer 'add' (add) adds something else"),
    "broadcast": (lambda m, x: m.fc(x) + m.other(x), "layer 'add' (add) adds samples of shapes (6,) and (1,)"),
    "alpha": (lambda m, x: torch.add(x, m.fc(x), alpha=2), "layer 'add' (add) has alpha=2"),
    "out": (lambda m, x: torch.add(m.fc(x), x, out=x), "layer 'add' (add) is called as its row"),
    "scaled weight": (lambda m, x: F.linear(x, m.fc.weight * 2), "layer 'mul' (mul) has no row"),
    "buffer weight": (lambda m, x: F.linear(x, m.flag), "layer 'linear' (linear) takes as its weight something else"),
    "bias of another shape": (lambda m, x: F.linear(x, m.fc.weight, m.other.bias), "layer 'linear' (linear) takes a"),
    "active dropout": (lambda m, x: F.dropout(m.fc(x), 0.5, m.training), "layer 'dropout' (dropout) is active"),
    "running statistics": (
        lambda m, x: F.batch_norm(m.fc(x), m.flag, m.flag, training=True),
        "layer 'batch_norm' (batch_norm) may use running statistics",
    ),
    "part of a sample": (lambda m, x: F.layer_norm(m.fc(x), x.shape), "layer 'layer_norm' (layer_norm) normalises"),
    "weight alone": (
        lambda m, x: F.layer_norm(x, (6,), weight=m.fc.bias),
        "layer 'layer_norm' (layer_norm) has a weight alone",
    ),
    "tuple": (lambda m, x: (m.fc(x), x), "the model's forward gives a tuple"),
    "weight as output": (lambda m, x: m.fc.weight, "the model's forward gives something else"),
    "nothing": (lambda m, x: None, "the model's forward gives a NoneType"),
    "input": (lambda m, x: x, "gives its input back"),
    "dead but unknown": (lambda m, x: (m.fc(x).cumsum(0), m.fc(x))[1], "layer 'cumsum' (Tensor.cumsum) has no row"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    function, reason = FORWARDS[name]
    net = fc(function, other=nn.Linear(6, 1), a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 1, 1))
    net.register_buffer("flag", torch.ones(6, 6))
    net.log = []
    refused(net, (6,), reason)
    assert net.log == [] and not hasattr(net, "features") and net.fc.weight.requires_grad


def test_tied_weights() -> None:
    refused(build("tied"), (6,), "layer '2' (Linear) shares the parameter '0.weight' with layer '0' (Linear)")


def test_running_statistics() -> None:
    model = mf.models.Conv4(3, width=4)
    reason = "layer 'encoder.layers.1' (BatchNorm2d) uses running statistics by batch_norm='running'"
    refused(model, (1, 28, 28), reason, "running")
    assert lower(mf.models.MLP(3, (4,), 2), (3,), "running").output == (2,)


def test_hooks() -> None:
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        net = fc(lambda m, x: m.fc(x))
        handle = getattr(net.fc, f"register_{register}")(lambda *_: None)
        refused(net, (6,), "layer 'fc' (Linear) has hooks")
        handle.remove()
        assert lower(net, (6,), "batch").output == (6,)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        refused(net, (6,), "torch has hooks on every module")
    finally:
        handle.remove()


def test_parametrisations() -> None:
    for parametrise in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = fc(lambda m, x: m.fc(x))
        parametrise(net.fc)
        refused(net, (6,), "layer 'fc' (ParametrizedLinear) has no row")
    net = fc(lambda m, x: m.fc(x))
    nn.utils.spectral_norm(net.fc)
    refused(net, (6,), "layer 'fc' (Linear) has hooks")


def test_other_classes() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2)

    class Weight(nn.Parameter):
        pass

    refused(nn.Sequential(Doubled(2, 2)), (2,), "layer 'mul' (mul) has no row")
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight = Weight(torch.ones(2, 2))
    refused(net, (2,), "parameter '0.weight' is a Weight")


def test_a_forward_that_is_not_the_classes() -> None:
    net = fc(lambda m, x: m.fc(x))
    net.fc.forward = types.MethodType(lambda self, x: x, net.fc)
    refused(net, (6,), "layer 'fc' (Linear) has a forward of its own")


def test_a_class_that_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
    refused(nn.Sequential(nn.Linear(2, 2)), (2,), "not what torch.fx sees of it: the outputs differ")


def test_a_gradient_that_is_not_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward

    def doubled_gradient(self: nn.Linear, x: Tensor) -> Tensor:
        y = original(self, x)
        return 2 * y - y.detach()

    monkeypatch.setattr(nn.Linear, "forward", doubled_gradient)
    refused(nn.Sequential(nn.Linear(2, 2)), (2,), "not what torch.fx sees of it: the gradients differ")


def test_state_that_could_change_unseen() -> None:
    class Settings:
        pass

    net = fc(lambda m, x: m.fc(x))
    net.settings = Settings()
    refused(net, (6,), "the model (Net) has an attribute 'settings' (Settings) that could change unseen")
    del net.settings
    net.scale = torch.ones(())
    refused(net, (6,), "the model (Net) has an attribute 'scale' (Tensor) that could change unseen")


def test_a_model_that_does_not_copy() -> None:
    class Same(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> Same:
            return self

    class Never(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> Never:
            raise TypeError("one of its kind")

    refused(Same(2, 2), (2,), "the model (Same) copies itself as something else")
    refused(Never(2, 2), (2,), "the model (Never) cannot be copied: one of its kind")


def test_compiled_by_jit() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.add_module("frozen", torch.jit.trace(nn.Tanh(), torch.zeros(1, 2)))
    refused(net, (2,), "layer 'frozen' (TopLevelTracedModule) is compiled by torch.jit")


def test_arguments() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module"):
        lower(3, (2,), "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^sample_shape: expected an int of at least 1, got 0"):
        lower(net, (0,), "batch")
    with pytest.raises(ValueError, match="^batch_norm: expected one of"):
        lower(net, (2,), "none")


@needs_kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("each", [True, False])
def test_forward_mode_of_rates_does_not_pass_unseen(each: bool) -> None:
    """A native meta-step would drop the tangents."""
    model = nn.Linear(2, 1).double()
    rule = mf.LearnedRates(model, 0.1) if each else mf.LayerRates(model, 1, 0.1)
    learner = mf.GradientLearner(model, rule, steps=1, loss="mse")
    x, y = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)
    with forward_ad.dual_level():
        rule._parameters["rates"] = forward_ad.make_dual(rule.rates, torch.ones_like(rule.rates))
        with pytest.raises(NotImplementedError, match="a meta-step has no derivative in forward mode"):
            learner(mf.Episodes(x, y, x, y))
