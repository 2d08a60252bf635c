"""The native engine on random networks, threads, processes and odd memory, against plain autograd in float64."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast import _native
from tests.backends import in_every_order, kernels_of, native, on_cpu_and_simt, poisoned
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


# Of the emulator those that take it a second or two.
SEEDS = [pytest.param("cpu", seed, marks=kernels_of("cpu")) for seed in range(40)]
SEEDS += [pytest.param("simt", seed, marks=kernels_of("simt")) for seed in range(12)]


@pytest.mark.parametrize(("backend", "seed"), SEEDS)
def test_meta_gradients_of_random_networks(backend: str, seed: int) -> None:
    model, shape = random_net(seed)
    model = model.double()
    ways = model(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    loss = loss_for(ways, seed)
    episodes = random_episodes(shape, ways, seed, loss)
    steps, first_order = seed % 4, seed % 5 == 0
    maml = mf.MAML(model, lr=0.05, steps=steps, loss=loss, first_order=first_order)
    with mf.use_backend(backend):
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
@pytest.mark.parametrize("bias", [True, False])
def test_more_samples_than_a_block_of_a_product(bias: bool) -> None:
    """The outer product of 1300 samples goes by blocks, which add to what the first one left of phi, and of lam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 41, bias=bias), nn.Tanh(), nn.Linear(41, 7, bias=bias)).double()
    x, y = torch.randn(2, 1333, 65, dtype=torch.float64), torch.randint(7, (2, 1333))
    episodes = mf.Episodes(x[:, :1300], y[:, :1300], x[:, 1300:], y[:, 1300:])
    mf.MAML(model, lr=0.5, steps=3).accumulate_grad(episodes)
    found = gradient(model)
    model.zero_grad()
    mf.reference.maml(model, episodes, lr=0.5, steps=3).loss.backward()
    assert relative_error(found, gradient(model)) < BAR


@on_cpu_and_simt
@pytest.mark.parametrize("seed", range(100, 112))
def test_the_four_functions_of_random_networks(seed: int, backend: str) -> None:
    model, shape = random_net(seed)
    model = model.double()
    ways = model(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    loss = loss_for(ways, seed)
    episodes = random_episodes(shape, ways, seed, loss)
    found, _ = four_functions.native(model, episodes, loss, backend=backend)
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
@pytest.mark.parametrize("name", ["conv4", "mlp"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_a_workspace_keeps_of_the_parameters_is_of_one_call(steps: int, name: str) -> None:
    """Tasks share what a thread makes of theta alone; when theta has moved it is made anew."""
    torch.set_num_threads(1)
    model, episodes = build(name), episodes_for(name, tasks=3)
    maml = mf.MAML(model, lr=0.1, steps=steps)
    for _ in range(3):
        with torch.no_grad():
            maml(episodes)
        for door in ("accumulate", "autograd"):
            model.zero_grad()
            maml.accumulate_grad(episodes) if door == "accumulate" else maml(episodes).loss.backward()
            found = gradient(model)
            model.zero_grad()
            mf.reference.maml(model, episodes, lr=0.1, steps=steps).loss.backward()
            assert relative_error(found, gradient(model)) < BAR
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)


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


def meta_steps(model: nn.Module) -> dict[str, mf.GradientLearner | mf.ProtoNets]:
    """A learner for each way through the engine, with what it can do besides."""
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer(3, learn_state=True).double()
    return {
        "sgd": mf.GradientLearner(model, mf.SGD(0.1), steps=3, query_weights=(0.5, 0.0, 1.5), truncate=2),
        "rates": mf.GradientLearner(model, mf.LayerRates(model, 2, 0.1), steps=2, support_batch=3),
        "lstm": mf.LOMAML(model, optimizer, lr=0.2, steps=2),
        "first order": mf.LOMAML(model, optimizer, lr=0.2, steps=2, first_order=True),
        "protonets": mf.ProtoNets(model),
    }


@pytest.mark.parametrize("backend", [pytest.param("simt", marks=kernels_of("simt"))])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "residual"])
def test_the_same_bits_in_every_order_and_by_both_doors(name: str, backend: str) -> None:
    """On a device, where a block's and a thread's turn is nobody's choice; and the numbers of the CPU's kernels."""
    model, episodes = build(name), episodes_for(name, tasks=2)

    def results() -> list[Tensor]:
        found = []
        for learner in meta_steps(model).values():
            learner.zero_grad()
            out = learner.accumulate_grad(episodes)
            found += [out.logits, out.losses, gradient(learner)]
        return found

    with mf.use_backend(backend), poisoned():
        found = in_every_order(backend, results)
        by_autograd = []
        for learner in meta_steps(model).values():
            learner.zero_grad()
            out = learner(episodes)
            out.loss.backward()
            by_autograd += [out.logits.detach(), out.losses.detach(), gradient(learner)]
    assert all(torch.equal(a, b) for a, b in zip(found, by_autograd))
    with mf.use_backend("cpu"):
        for one, wanted in zip(found, results()):
            assert relative_error(one, wanted) <= BAR


@pytest.mark.parametrize("backend", [pytest.param("simt", marks=kernels_of("simt"))])
def test_a_small_convolutional_network_in_every_order(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    episodes = random_episodes((1, 5, 4), 3, 1)
    maml = mf.MAML(model, lr=0.1, steps=2)

    def results() -> list[Tensor]:
        model.zero_grad()
        out = maml.accumulate_grad(episodes)
        return [out.logits, out.losses, gradient(model)]

    with mf.use_backend(backend):
        logits, losses, found = in_every_order(backend, results)
    model.zero_grad()
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=2)
    wanted.loss.backward()
    for one, other in ((logits, wanted.logits), (losses, wanted.losses), (found, gradient(model))):
        assert relative_error(one, other) <= BAR


@on_cpu_and_simt
def test_odd_strides_and_channels_last(backend: str) -> None:
    name = "conv4" if backend == "cpu" else "batch_norm"
    with mf.use_backend(backend):
        odd_strides_and_channels_last(name)


def odd_strides_and_channels_last(name: str) -> None:
    model, episodes = build(name), episodes_for(name)
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


@on_cpu_and_simt
def test_any_cotangent_and_twice_through_the_same_graph(backend: str) -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm")
    maml = mf.MAML(model, lr=0.1, steps=2)

    def objective(out: mf.Outcome) -> Tensor:
        return out.loss * 0.5 + (out.losses**2).sum() + (out.logits.tanh() * 0.3).sum()

    with mf.use_backend(backend):
        loss = objective(maml(episodes))
        loss.backward(retain_graph=True)
        once = gradient(model)
        loss.backward()
    assert relative_error(gradient(model), 2 * once) < 1e-14
    model.zero_grad()
    objective(mf.reference.maml(model, episodes, lr=0.1, steps=2)).backward()
    assert relative_error(once, gradient(model)) < BAR


@on_cpu_and_simt
def test_weights_that_require_gradients(backend: str) -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    found, wanted = (torch.linspace(0.1, 1.0, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with mf.use_backend(backend):
        mf.MAML(model, lr=0.1, steps=2)(episodes, found).loss.backward()
    mine = gradient(model)
    model.zero_grad()
    mf.reference.maml(model, episodes, lr=0.1, steps=2, weights=wanted).loss.backward()
    assert relative_error(mine, gradient(model)) < BAR
    assert relative_error(found.grad, wanted.grad) < BAR


@on_cpu_and_simt
def test_float32_errs_at_most_twice_as_much_as_torch_in_float32(backend: str) -> None:
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
                with mf.use_backend(backend):
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
def test_a_network_goes_by_the_backend_that_is_in_force() -> None:
    """The same learner and signature by one after the other: none takes the other's kernels."""
    if "simt" not in _native.status().backends:
        pytest.skip(_native.missing("simt"))
    model, episodes, module = build("mlp"), episodes_for("mlp"), _native.native()
    maml = mf.MAML(model, lr=0.1, steps=1)
    for backend in ("cpu", "simt", "auto", "simt"):
        before = module.simt_blocks()
        with mf.use_backend(backend):
            maml(episodes)
        assert (module.simt_blocks() > before) == (backend == "simt")
    with mf.use_backend("torch"):
        assert maml._task.native(episodes.support_x) is None


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


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_accuracy_takes_nan_for_the_largest_as_torch_does(bad: int, dtype: torch.dtype) -> None:
    model = nn.Linear(6, 3).to(dtype)
    with torch.no_grad():
        model.bias[bad] = float("nan")
    x = torch.randn(2, 5, 6, dtype=dtype)
    y = torch.tensor([[0, 0, 1, 2, 2], [1, 2, 1, 1, 0]])
    episodes = mf.Episodes(x, y, x, y)
    with mf.use_backend("cpu"):
        found = mf.MAML(model, lr=0.0, steps=0)(episodes).accuracy
    assert torch.equal(found, (y == bad).to(dtype).mean(1))
