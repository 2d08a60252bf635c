"""The guard sees whatever could change what a lowered module computes."""

from __future__ import annotations

import argparse
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast as mf
from metafast import _native
from metafast.engine.batch_norm import policy
from metafast.engine.guard import Guard, NotLowered, hooked


@dataclass
class Settings:
    width: int
    names: list[str]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.BatchNorm1d(4), nn.Dropout(0.0))
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.sizes = [3, [4, 2]]
        self.table: dict[str, Any] = {"act": F.relu, "layers": [self.head]}
        self.settings = Settings(4, ["a"])
        self.options = argparse.Namespace(depth=2)
        self.record = types.SimpleNamespace(inner={1, 2})
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.describe = self.head.extra_repr
        self.pair = (1, [2])
        self.register_buffer("mask", None)


def replaced(m: nn.Module, name: str) -> None:
    getattr(m, name).data = torch.zeros(5)


CHANGES: dict[str, Callable[[Net], object]] = {
    "attribute": lambda m: setattr(m.layers[1], "negative_slope", 0.2),
    "attribute of the root": lambda m: setattr(m, "sizes", [3, [4, 2]]),
    "new attribute": lambda m: setattr(m, "flag", True),
    "attribute gone": lambda m: delattr(m, "pair"),
    "own forward": lambda m: setattr(m.head, "forward", lambda x: x),
    "module": lambda m: setattr(m, "head", nn.Linear(4, 2)),
    "module in a Sequential": lambda m: m.layers.__setitem__(1, nn.LeakyReLU(0.1)),
    "module more": lambda m: m.layers.append(nn.ReLU()),
    "module gone": lambda m: m.layers.__delitem__(3),
    "order of modules": lambda m: m.layers._modules.update({"0": m.layers._modules.pop("0")}),
    "class": lambda m: setattr(m.head, "__class__", nn.Bilinear),
    "parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
    "parameter gone": lambda m: setattr(m.head, "bias", None),
    "parameter more": lambda m: m.layers[1].register_parameter("weight", nn.Parameter(torch.zeros(1))),
    "requires_grad": lambda m: m.head.bias.requires_grad_(False),
    "requires_grad of a frozen one": lambda m: m.frozen.requires_grad_(),
    "shape of a frozen one": lambda m: replaced(m, "frozen"),
    "eval": lambda m: m.eval(),
    "one layer in eval": lambda m: m.layers[3].eval(),
    "dropout": lambda m: setattr(m.layers[3], "p", 0.5),
    "forward hook": lambda m: m.head.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.layers.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.layers[0].register_full_backward_hook(lambda *_: None),
    "parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m.head),
    "buffer there": lambda m: setattr(m, "mask", torch.zeros(1)),
    "list in a list": lambda m: m.sizes[1].append(1),
    "list in a tuple": lambda m: m.pair[1].append(1),
    "dictionary": lambda m: m.table.update(act=F.gelu),
    "module in a list": lambda m: m.table["layers"].__setitem__(0, m.layers[0]),
    "dataclass": lambda m: setattr(m.settings, "width", 5),
    "list in a dataclass": lambda m: m.settings.names.append("b"),
    "namespace": lambda m: setattr(m.options, "depth", 3),
    "set in a namespace": lambda m: m.record.inner.add(3),
    "partial": lambda m: m.act.keywords.update(negative_slope=0.5),
    "opaque": lambda m: m.table.update(act=torch.zeros(1)),
}


@pytest.fixture(autouse=True, params=["extension", "python"])
def _who_asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionaries are looked at by the extension, or where there is none by Python."""
    if request.param == "python":
        monkeypatch.setattr("metafast.engine.guard.native", lambda: None)
    elif not _native.status().available:
        pytest.skip(f"no extension: {_native.status().reason}")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    net = Net()
    guard = Guard(net)
    assert guard.holds() and guard.holds()
    CHANGES[name](net)
    assert not guard.holds()


def test_a_change_back_is_none() -> None:
    net = Net()
    guard = Guard(net)
    handle = net.head.register_forward_hook(lambda *_: None)
    net.layers[3].eval()
    assert not guard.holds()
    handle.remove()
    assert not guard.holds()
    net.layers[3].train()
    assert guard.holds()


def test_hooks_on_every_module_are_seen() -> None:
    guard = Guard(Net())
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert not guard.holds()
    finally:
        handle.remove()
    assert guard.holds()


def test_a_forward_put_on_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(Net())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not guard.holds()


def test_training_changes_nothing() -> None:
    """New numbers, gradients, optimiser steps, state_dict loads, running statistics: still the same module."""
    net = mf.models.Conv4(3, width=4)
    guard = Guard(net)
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 1, 28, 28)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    net.load_state_dict(mf.models.Conv4(3, width=4).state_dict())
    net.double()
    net.register_state_dict_pre_hook(lambda *_: None)
    assert guard.holds()


def test_the_batch_norm_policy_is_no_change() -> None:
    """Another thread may hold it while this one asks."""
    net = mf.models.Conv4(3, width=4)
    guard = Guard(net)
    for name in ("batch", "running"):
        with policy(net, name):
            assert guard.holds()


def test_a_function_that_is_gone_is_not_taken_for_a_new_one() -> None:
    """Which may get the address of the old one."""
    net = Net()
    for _ in range(100):
        net.sizes[:] = [lambda x: x]
        guard = Guard(net)
        net.sizes[:] = []
        net.sizes.append(lambda x: -x)
        assert not guard.holds()


def test_cycles_are_refused() -> None:
    net = Net()
    net.sizes.append(net.sizes)
    with pytest.raises(NotLowered, match=r"the model \(Net\) has an attribute 'sizes' \(list\)"):
        Guard(net)


def test_a_guard_keeps_to_its_module_alone() -> None:
    first, second = Net(), Net()
    guard = Guard(first)
    second.eval()
    assert guard.holds()


def gradient_hook(p: Tensor) -> Any:
    return p.register_hook(lambda g: g)


def accumulation_hook(p: Tensor) -> Any:
    return p.register_post_accumulate_grad_hook(lambda q: None)


@pytest.mark.parametrize("register", [gradient_hook, accumulation_hook])
def test_hooks_of_parameters_are_seen_while_they_are_there(register: Callable[[Tensor], Any]) -> None:
    parameters = [nn.Parameter(torch.zeros(1)), torch.zeros(2, requires_grad=True)]
    assert not hooked(parameters) and not hooked(iter(parameters)) and not hooked([])
    hook = register(parameters[1])
    assert hooked(parameters) and hooked(iter(parameters)) and not hooked(parameters[:1])
    hook.remove()
    assert not hooked(parameters)
