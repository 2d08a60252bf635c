"""The native engine on random networks, threads, processes and odd memory, against plain autograd in float64."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import native
from tests.engine import four_functions
from tests.engine.random_nets import random_net
from tests.nets import build, episodes_for, gradient, relative_error

BAR = 1e-10


def loss_for(ways: int, seed: int) -> str:
    """A loss that is not zero whatever the network does, as the cross-entropy of one class is."""
    return "mse" if ways == 1 or seed % 3 == 0 else "cross_entropy"


def random_episodes(shape: tuple[int, ...], ways: int, seed: int, loss: str = "cross_entropy") -> mf.Episodes:
    """Float64 episodes of odd sizes for samples of a shape."""
    g = torch.Generator().manual_seed(seed)
    tasks, shots, queries = 1 + seed % 4, 2 + seed % 5, 1 + seed % 7
    sides = []
    for samples in (shots, max(queries, 2)):
        sides.append(torch.randn(tasks, samples, *shape, dtype=torch.float64, generator=g))
        labels = torch.randint(ways, (tasks, samples), generator=g)
        targets = torch.randn(tasks, samples, ways, dtype=torch.float64, generator=g)
        sides.append(targets if loss == "mse" else labels)
    return mf.Episodes(*sides)


def network_of(learner: mf.GradientLearner) -> object:
    """The one native network that a learner ran."""
    (networks,) = learner._task.native._found.values()
    return networks[-1]


@native
@pytest.mark.parametrize("seed", range(40))
def test_meta_gradients_of_random_networks(seed: int) -> None:
    model, shape = random_net(seed)
    model = model.double()
    ways = model(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    loss = loss_for(ways, seed)
    episodes = random_episodes(shape, ways, seed, loss)
    steps, first_order = seed % 4, seed % 5 == 0
    maml = mf.MAML(model, lr=0.05, steps=steps, loss=loss, first_order=first_order)
    with mf.use_backend("cpu"):
        out = maml(episodes)
        out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    wanted = mf.reference.maml(model, episodes, lr=0.05, steps=steps, loss=loss, first_order=first_order)
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) < BAR
    assert relative_error(out.logits, wanted.logits) < BAR
    assert out.accuracy is wanted.accuracy is None or torch.equal(out.accuracy, wanted.accuracy)
    assert relative_error(found, gradient(model)) < BAR


@native
@pytest.mark.parametrize("seed", range(100, 112))
def test_the_four_functions_of_random_networks(seed: int) -> None:
    model, shape = random_net(seed)
    model = model.double()
    ways = model(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    loss = loss_for(ways, seed)
    episodes = random_episodes(shape, ways, seed, loss)
    found, _ = four_functions.native(model, episodes, loss)
    wanted = four_functions.plain(model, episodes, loss)
    for name in four_functions.NAMES:
        assert relative_error(found[name], wanted[name]) < BAR


@native
@pytest.mark.parametrize("name", ["conv4", "mlp", "residual", "batch_norm"])
def test_the_same_bits_for_any_number_of_threads_and_doors(name: str) -> None:
    model, episodes = build(name), episodes_for(name, tasks=7)
    results = []
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        maml = mf.MAML(model, lr=0.1, steps=3)
        for door in ("autograd", "accumulate"):
            model.zero_grad()
            if door == "autograd":
                out = maml(episodes)
                out.loss.backward()
            else:
                out = maml.accumulate_grad(episodes)
            results.append((gradient(model), out.losses.detach(), out.logits.detach(), out.loss.detach()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@native
def test_fewer_tasks_than_threads_and_one_task() -> None:
    torch.set_num_threads(4)
    for tasks in (1, 2, 3):
        model, episodes = build("conv4"), episodes_for("conv4", tasks=tasks)
        mf.MAML(model, lr=0.1, steps=2)(episodes).loss.backward()
        found = gradient(model)
        model.zero_grad()
        mf.reference.maml(model, episodes, lr=0.1, steps=2).loss.backward()
        assert relative_error(found, gradient(model)) < BAR


@native
def test_odd_strides_and_channels_last() -> None:
    model, episodes = build("conv4"), episodes_for("conv4")
    maml = mf.MAML(model, lr=0.1, steps=2)
    wanted = maml(episodes)

    def odd(x: Tensor) -> Tensor:
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    strided = mf.Episodes(*(odd(getattr(episodes, n)) for n in ("support_x", "support_y", "query_x", "query_y")))
    assert not strided.support_x.is_contiguous()
    model.to(memory_format=torch.channels_last)
    out = maml(strided)
    assert torch.equal(out.losses, wanted.losses)
    out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    wanted.loss.backward()
    assert torch.equal(found, gradient(model))


@native
def test_several_python_threads_at_once() -> None:
    model, episodes = build("mlp"), episodes_for("mlp", tasks=9)
    maml = mf.MAML(model, lr=0.1, steps=3)
    torch.set_num_threads(2)
    with torch.no_grad():
        wanted = maml(episodes).losses
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(maml(episodes).losses, wanted):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@native
def test_after_fork() -> None:
    model, episodes = build("mlp"), episodes_for("mlp", tasks=9)
    maml = mf.MAML(model, lr=0.1, steps=3)
    torch.set_num_threads(2)
    with torch.no_grad():
        wanted = maml(episodes).losses
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(maml(episodes).losses, wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0


@native
def test_any_cotangent_and_twice_through_the_same_graph() -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm")
    maml = mf.MAML(model, lr=0.1, steps=2)

    def objective(out: mf.Outcome) -> Tensor:
        return out.loss * 0.5 + (out.losses**2).sum() + (out.logits.tanh() * 0.3).sum()

    loss = objective(maml(episodes))
    loss.backward(retain_graph=True)
    once = gradient(model)
    loss.backward()
    assert relative_error(gradient(model), 2 * once) < 1e-14
    model.zero_grad()
    objective(mf.reference.maml(model, episodes, lr=0.1, steps=2)).backward()
    assert relative_error(once, gradient(model)) < BAR


@native
def test_weights_that_require_gradients() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    found, wanted = (torch.linspace(0.1, 1.0, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mf.MAML(model, lr=0.1, steps=2)(episodes, found).loss.backward()
    mine = gradient(model)
    model.zero_grad()
    mf.reference.maml(model, episodes, lr=0.1, steps=2, weights=wanted).loss.backward()
    assert relative_error(mine, gradient(model)) < BAR
    assert relative_error(found.grad, wanted.grad) < BAR


@native
def test_float32_errs_at_most_twice_as_much_as_torch_in_float32() -> None:
    torch.manual_seed(0)
    nets = {
        "mlp": (mf.models.MLP(6, (33, 17), 3, "tanh"), (6,)),
        "norms": (nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3)), (6,)),
        "conv": (
            nn.Sequential(
                nn.Conv2d(1, 7, 3, padding=1),
                nn.BatchNorm2d(7),
                nn.SiLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(112, 3),
            ),
            (1, 8, 8),
        ),
    }
    for model, shape in nets.values():
        episodes = random_episodes(shape, 3, 6)
        grads = {}
        for run, dtype in (("exact", torch.float64), ("plain", torch.float32), ("native", torch.float32)):
            net = model.to(dtype)
            net.zero_grad()
            e = episodes.to(dtype=dtype)
            if run == "native":
                with mf.use_backend("cpu"):
                    mf.MAML(net, lr=0.1, steps=3)(e).loss.backward()
            else:
                mf.reference.maml(net, e, lr=0.1, steps=3).loss.backward()
            grads[run] = gradient(net).double()
        error, plain = (relative_error(grads[run], grads["exact"]) for run in ("native", "plain"))
        assert error < 2 * plain + 1e-6


@native
@pytest.mark.parametrize(("width", "image", "samples"), [(64, (1, 28, 28), (5, 75)), (32, (3, 84, 84), (25, 75))])
def test_memory_grows_by_the_steps_parameters_alone(
    width: int, image: tuple[int, int, int], samples: tuple[int, int]
) -> None:
    """The workspace of a Conv4 thread at K=20, less phi_1..phi_K, is that at K=1 to the byte."""
    net = mf.models.Conv4(5, width, in_channels=image[0], image_size=image[1])
    maml = mf.MAML(net)
    with mf.use_backend("cpu"):
        maml.adapt(torch.zeros(1, 1, *image), torch.zeros(1, 1, dtype=torch.int64))
    engine = network_of(maml).engine
    (one, its_tape), (twenty, their_tape) = (engine.workspace(*samples, steps) for steps in (1, 20))
    assert their_tape == 20 * its_tape
    assert twenty - their_tape == one - its_tape


@native
def test_a_changed_module_is_lowered_again() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=2)
    maml(episodes)
    first = network_of(maml)
    model[1] = nn.Tanh()
    out = maml(episodes)
    assert network_of(maml) is not first
    assert relative_error(out.losses, mf.reference.maml(model, episodes, lr=0.1, steps=2).losses) < BAR


@native
def test_modes_back_and_forth_lower_twice_only() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=1)
    for _ in range(3):
        for training in (True, False):
            maml.train(training)
            maml(episodes)
    (networks,) = maml._task.native._found.values()
    assert len(networks) == 2


@native
def test_autocast_goes_by_torch() -> None:
    model, episodes = build("mlp").float(), episodes_for("mlp").to(dtype=torch.float32)
    maml = mf.MAML(model, lr=0.1, steps=1)
    maml(episodes)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        maml(episodes)


@native
def test_what_falls_back_says_so_once_and_a_forced_backend_refuses() -> None:
    model, episodes = build("tied"), episodes_for("tied")
    maml = mf.MAML(model, lr=0.1, steps=1)
    with pytest.warns(UserWarning, match=r"Sequential runs by torch, without native kernels: layer '2'") as caught:
        maml(episodes)
        maml(episodes)
    assert len(caught) == 1
    with mf.use_backend("cpu"), pytest.raises(ValueError, match=r"^model: backend 'cpu' is forced, but layer '2'"):
        maml(episodes)
