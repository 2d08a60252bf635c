"""Recordings of the torch engine: the same bits, and none where Python state could change what they should be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.engine import traced
from tests.nets import NETS, build, episodes_for, gradient, relative_error


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch engine, recording at the second call, so that tests need not make a dozen."""
    monkeypatch.setattr(traced, "_CALLS_BEFORE_RECORDING", 1)
    with mf.use_backend("torch"):
        yield


def recordings(learner: mf.GradientLearner) -> list[object]:
    engine = learner._engines.vmapped
    parts = (engine._support_grad, engine._hvp, engine._outputs, engine._pullback)
    return [r for part in parts for r in part._recordings.values()]


@pytest.mark.parametrize("name", NETS)
def test_a_recording_gives_the_same_bits(name: str) -> None:
    model, episodes = build(name), episodes_for(name)
    maml = mf.MAML(model, lr=0.1, steps=1)
    losses, grads = [], []
    for _ in range(4):
        maml.zero_grad()
        out = maml(episodes)
        out.loss.backward()
        losses.append(out.losses.detach())
        grads.append(gradient(model))
    assert len(recordings(maml)) == 4 and None not in recordings(maml)
    assert all(torch.equal(value, losses[0]) for value in losses)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_a_recording_sees_new_data_parameters_and_buffers() -> None:
    model = build("conv4")
    maml = mf.MAML(model, lr=0.1, steps=1, batch_norm="running")
    for seed in range(4):
        maml(episodes_for("conv4", seed=seed)).loss.backward()
    assert None not in recordings(maml)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    episodes = episodes_for("conv4", seed=7)
    maml.zero_grad()
    out = maml(episodes)
    out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    mf.reference.maml(model, episodes, lr=0.1, steps=1, batch_norm="running").loss.backward()
    assert relative_error(found, gradient(model)) < 1e-10


class Switched(nn.Module):
    """Its forward hangs on an attribute, a nested setting and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.scale = 1.0
        self.settings: dict[str, list[float]] = {"shift": [0.0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x).tanh() + self.settings["shift"][0]


def test_changed_attributes_are_noticed() -> None:
    model, episodes = Switched().double(), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=1)

    def check() -> None:
        for _ in range(3):
            found = maml(episodes).losses
            wanted = mf.reference.maml(model, episodes, lr=0.1, steps=1).losses
            assert relative_error(found, wanted) < 1e-12

    check()
    assert recordings(maml)
    model.scale = 2.0
    check()
    model.settings["shift"][0] = 0.5
    check()
    model.linear = nn.Linear(6, 3).double()
    check()


class Captured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.mask = torch.ones(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() * self.mask


def test_nothing_is_recorded_of_what_cannot_be_seen() -> None:
    episodes = episodes_for("mlp")
    captured = mf.MAML(Captured().double(), lr=0.1, steps=1)
    hooked = mf.MAML(build("mlp"), lr=0.1, steps=1)
    hooked.model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    weight = {"value": 1.0}
    scheduled = mf.MAML(
        build("mlp"), lr=0.1, steps=1, loss=lambda f, y: weight["value"] * nn.functional.cross_entropy(f, y)
    )
    for learner in (captured, hooked, scheduled):
        for _ in range(4):
            learner(episodes).loss.backward()
        assert recordings(learner) == []
    weight["value"] = 3.0
    wanted = mf.reference.maml(scheduled.model, episodes, lr=0.1, steps=1, loss=scheduled._task.loss.function)
    assert relative_error(scheduled(episodes).losses, wanted.losses) < 1e-12


@pytest.mark.parametrize("again", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_copies_make_their_own_recordings(again: object) -> None:
    maml, episodes = mf.MAML(build("mlp"), lr=0.1, steps=1), episodes_for("mlp")
    for _ in range(3):
        maml(episodes)
    other = again(maml)
    assert recordings(maml) and not recordings(other)
    with torch.no_grad():
        other.model[0].weight.mul_(2.0)
    wanted = mf.reference.maml(other.model, episodes, lr=0.1, steps=1).losses
    assert relative_error(other(episodes).losses, wanted) < 1e-12
