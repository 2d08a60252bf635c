"""Memory does not grow with the number of meta-steps: some thousands here, a hundred thousand by ``make soak``."""

from __future__ import annotations

import gc
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import metafast as mf
from tests.backends import native
from tests.nets import build, episodes_for

STEPS = int(os.environ.get("METAFAST_SOAK", "5000"))
# What an allocator may keep to itself: a step that leaked 10 bytes would take as much in 100,000 of them.
SLACK = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
SIZES = 64  # csrc/engine/build.h, kMostLayouts

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def growth(step: Callable[[], None], steps: int, warm_up: int, settle: Callable[[], None] = lambda: None) -> int:
    """By how much memory grows in ``steps`` steps after those to warm up, each time seen after ``settle()``."""
    found = []
    for count in (warm_up, steps):
        for _ in range(count):
            step()
        settle()
        found.append(resident())
    return found[1] - found[0]


def training(learner: nn.Module, door: str, sample: Callable[[], mf.Episodes]) -> Callable[[], None]:
    """A meta-step with an optimiser's, as training code has it."""
    outer = torch.optim.SGD(learner.parameters(), lr=1e-6)

    def step() -> None:
        outer.zero_grad()
        if door == "accumulate":
            learner.accumulate_grad(sample())
        else:
            learner(sample()).loss.backward()
        outer.step()

    return step


def test_a_leak_is_seen() -> None:
    leaked: list[mmap.mmap] = []

    def leak() -> None:
        # Memory of its own: less than what the process has free from tests before would be taken from that.
        leaked.append(mmap.mmap(-1, 4096))
        leaked[-1][0] = 1

    assert growth(leak, 2000, 10) > SLACK


@native
@pytest.mark.parametrize("door", ["autograd", "accumulate"])
def test_sinusoids(door: str) -> None:
    torch.manual_seed(0)
    waves, generator = mf.data.Sinusoid(), torch.Generator().manual_seed(0)
    maml = mf.MAML(mf.models.MLP(1, (40, 40), 1), lr=0.01, steps=1, loss="mse")
    with mf.use_backend("cpu"):
        step = training(maml, door, lambda: waves.sample(tasks=4, shots=10, queries=10, generator=generator))
        assert growth(step, STEPS, warm_up=1000) <= SLACK


LEARNERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "conv": ("conv4", lambda: mf.MAML(build("conv4"), lr=0.1, steps=2)),
    "rates": ("mlp", lambda: mf.GradientLearner(model := build("mlp"), mf.LayerRates(model, 2, 0.1), steps=2)),
    "momentum": ("mlp", lambda: mf.GradientLearner(build("mlp"), mf.Momentum(0.1), steps=2)),
    "lomaml": ("mlp", lambda: mf.LOMAML(build("mlp"), mf.LSTMOptimizer(hidden=4).double(), lr=0.1, steps=2)),
    "protonets": ("conv4", lambda: mf.ProtoNets(build("conv4"))),
}


@native
@pytest.mark.parametrize("door", ["autograd", "accumulate"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_learners(kind: str, door: str) -> None:
    name, make = LEARNERS[kind]
    episodes = episodes_for(name)
    with mf.use_backend("cpu"):
        assert growth(training(make(), door, lambda: episodes), STEPS // 20, warm_up=100) <= SLACK


@native
def test_two_threads() -> None:
    torch.set_num_threads(2)
    episodes = episodes_for("mlp", tasks=5)
    with mf.use_backend("cpu"):
        step = training(mf.MAML(build("mlp"), lr=0.1, steps=2), "accumulate", lambda: episodes)
        assert growth(step, STEPS // 20, warm_up=100) <= SLACK


@native
@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets"])
def test_episodes_of_ever_new_sizes(kind: str) -> None:
    """Layouts of workspaces, and what Python remembers of sizes, are kept for the latest alone."""
    make = {
        "maml": lambda: mf.MAML(build("mlp"), lr=0.1, steps=2),
        "lomaml": LEARNERS["lomaml"][1],
        "protonets": lambda: mf.ProtoNets(build("mlp")),
    }[kind]
    learner, r = make(), random.Random(0)
    x, y = torch.randn(2, 3 * 120, 6, dtype=torch.float64), torch.arange(3).repeat(2, 120)

    def of(shots: int, queries: int) -> mf.Episodes:
        return mf.Episodes(x[:, :shots], y[:, :shots], x[:, :queries], y[:, :queries])

    def settle() -> None:
        for shots in range(350, 358):  # as many workspaces as are kept, of the same sizes
            learner.accumulate_grad(of(shots, shots))

    with mf.use_backend("cpu"):
        step = training(learner, "accumulate", lambda: of(r.randint(3, 360), r.randint(3, 360)))
        # Longer to warm up: until what is remembered is full.
        assert growth(step, STEPS // 5, warm_up=1200, settle=settle) <= 4 * SLACK  # buffers of all sizes
        (network,) = learner._task.native._found[x.shape[2:], x.dtype]
        assert network.engine.layouts() <= SIZES


@native
def test_a_layout_that_was_dropped_is_made_again() -> None:
    """The bits stay, and one that a call holds is not freed under it."""
    model, episodes = build("mlp"), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=2)
    with mf.use_backend("cpu"):
        first = maml(episodes)
        for shots in range(1, 2 * SIZES):
            maml.adapt(episodes.support_x[:, :1].repeat(1, shots, 1), episodes.support_y[:, :1].repeat(1, shots))
        engine = maml._task.native(episodes.support_x).engine
        assert engine.layouts() == SIZES
        again = maml(episodes)
        assert engine.layouts() == SIZES
    assert torch.equal(first.losses, again.losses) and torch.equal(first.logits, again.logits)
    first.loss.backward()
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    again.loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(once, model.parameters()))


@native
def test_samples_of_ever_new_shapes() -> None:
    """A network of global pooling takes images of any size; each is lowered, the latest are kept."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    maml, y = mf.MAML(net.double(), lr=0.1, steps=1), torch.arange(3).repeat(2, 1)
    with mf.use_backend("cpu"):
        for size in range(5, 45):
            x = torch.randn(2, 3, 1, size, size, dtype=torch.float64)
            maml.accumulate_grad(mf.Episodes(x, y, x, y))
    native_networks = maml._task.native
    assert len(native_networks._found) == 16 and len(native_networks._fitting) == 1
