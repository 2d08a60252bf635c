"""The learned optimisers by themselves: a start as descent, saved and loaded, stepping ordinary networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import OperatorsSeen, native
from tests.nets import build, episodes_for, relative_error


@pytest.mark.parametrize("limit", [0.5, 1.0, 10.0])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (3, 1), (5, 3)])
def test_it_starts_as_descent_and_levels_off(limit: float, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer(hidden, layers).double().start_as_descent(limit)
    sizes = torch.tensor([1e-4, 1e-3, 1e-2], dtype=torch.float64) * limit
    grads = torch.cat([sizes, -sizes])
    updates, state = optimizer(grads, optimizer.init(6))
    assert updates.tolist() == pytest.approx(grads.tolist(), rel=0.02)
    # What is carried over from step to step adds little.
    for _ in range(4):
        updates, state = optimizer(grads, state)
    assert (updates / grads).tolist() == pytest.approx([1.0] * 6, abs=0.2)
    large, _ = optimizer(limit * torch.tensor([0.3, 1.0, 100.0, 1e4], dtype=torch.float64), optimizer.init(4))
    assert all(a < b for a, b in zip(large.tolist(), large.tolist()[1:]))
    assert 0.3 * limit < large[1] < large[3] < limit


def test_lomaml_then_starts_as_maml() -> None:
    torch.manual_seed(0)
    model = mf.models.MLP(1, (8, 8), 1).double()
    episodes = mf.data.Sinusoid().sample(5, 10, 10, torch.Generator().manual_seed(0), torch.float64)
    optimizer = mf.LSTMOptimizer().double().start_as_descent(limit=1000.0)
    lomaml = mf.LOMAML(model, optimizer, lr=0.01, steps=1, loss="mse")
    maml = mf.MAML(model, lr=0.01, steps=1, loss="mse")
    learned = lomaml.adapt(episodes.support_x, episodes.support_y).parameters
    for name, value in maml.adapt(episodes.support_x, episodes.support_y).parameters.items():
        start = dict(model.named_parameters())[name]
        assert torch.linalg.norm(learned[name] - value) < 0.02 * torch.linalg.norm(value - start)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), "1"])
def test_a_limit_out_of_range(limit: object) -> None:
    with pytest.raises((TypeError, ValueError), match="^limit: expected"):
        mf.LSTMOptimizer().start_as_descent(limit)


OPTIMIZERS: dict[str, Callable[[], mf.CoordinatewiseOptimizer]] = {
    "lstm": lambda: mf.LSTMOptimizer(hidden=5),
    "learned state": lambda: mf.LSTMOptimizer(hidden=3, layers=1, learn_state=True),
    "mlp": lambda: mf.MLPOptimizer(hidden=7, layers=1),
    "momenta": lambda: mf.MLPOptimizer(hidden=4, layers=2, momenta=(0.5, 0.9)),
}


def make(name: str) -> mf.CoordinatewiseOptimizer:
    """One in float64, every parameter moved off 0."""
    torch.manual_seed(4)
    optimizer = OPTIMIZERS[name]().double()
    with torch.no_grad():
        for p in optimizer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return optimizer


@pytest.mark.parametrize("momenta", [(), (0.3,), (0.9, 0.5, 0.99)])
@pytest.mark.parametrize(("hidden", "layers"), [(1, 1), (20, 2), (5, 3)])
def test_the_mlp_against_its_equations(hidden: int, layers: int, momenta: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    optimizer = mf.MLPOptimizer(hidden, layers, momenta).double()
    grads = torch.cat([torch.randn(5), torch.tensor([0.0, 1e-7, -1e-7, 30.0])]).double().requires_grad_()
    state = torch.randn(len(momenta), 9, dtype=torch.float64, requires_grad=True)
    weights = [(part.weight, part.bias) for part in (*optimizer.net, optimizer.output) if isinstance(part, nn.Linear)]
    inputs = [grads, *([state] if momenta else []), *optimizer.parameters()]
    found = []
    for updates, carried in (optimizer(grads, state), mf.reference.mlp_step(grads, state, weights, momenta)):
        pulled = torch.autograd.grad(updates.sin().sum() + carried.square().sum(), inputs)
        found.append([updates, carried, *pulled])
    for mine, plain in zip(*found):
        assert mine.shape == plain.shape
        assert mine.numel() == 0 or relative_error(mine, plain) <= 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_alone_for_another_network(name: str) -> None:
    learner = mf.LOMAML(build("mlp"), make(name), lr=0.2, steps=2)
    file = io.BytesIO()
    torch.save(learner.optimizer.state_dict(), file)
    file.seek(0)
    other = OPTIMIZERS[name]().double()
    other.load_state_dict(torch.load(file, weights_only=True))
    model, episodes = build("conv4"), episodes_for("conv4", tasks=2)
    with torch.no_grad():
        found = mf.LOMAML(model, other, lr=0.2, steps=2)(episodes)
        wanted = mf.LOMAML(model, learner.optimizer, lr=0.2, steps=2)(episodes)
    assert torch.equal(found.losses, wanted.losses)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, episodes: mf.Episodes, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(episodes.support_x[0]), episodes.support_y[0]).backward()
        optimizer.step()


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_torch_goes_the_way_of_the_inner_loop(name: str, backend: str) -> None:
    model, episodes, learned = build("layer_norm"), episodes_for("layer_norm", tasks=1), make(name)
    with mf.use_backend(backend):
        wanted = mf.LOMAML(model, learned, lr=0.2, steps=4).adapt(episodes.support_x, episodes.support_y).parameters
        descend(model, learned.as_torch(model.parameters(), lr=0.2), episodes, 4)
    for key, p in model.named_parameters():
        assert p.is_leaf and relative_error(p, wanted[key][0]) <= 1e-10
    assert all(p.grad is None for p in learned.parameters())


@native
def test_as_torch_runs_the_kernels_and_builds_no_graph() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    optimizer = make("lstm").as_torch(model.parameters())
    descend(model, optimizer, episodes, 1)
    with OperatorsSeen() as operators:
        optimizer.step()
    assert operators.seen.count(torch.ops.metafast.lstm_update.default) == 6
    assert not any(kept["state"].requires_grad for kept in optimizer.state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_as_torch_goes_on_from_a_copy(how: str, name: str) -> None:
    model, episodes, learned = build("mlp"), episodes_for("mlp"), make(name)
    optimizer = learned.as_torch(model.parameters(), lr=0.3)
    descend(model, optimizer, episodes, 2)
    if how == "deepcopy":
        twin, again = copy.deepcopy((model, optimizer))
        assert again.learned is not learned
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin = copy.deepcopy(model)
        again = learned.as_torch(twin.parameters(), lr=0.7)
        again.load_state_dict(torch.load(file, weights_only=True))
    for net, stepping in ((model, optimizer), (twin, again)):
        descend(net, stepping, episodes, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_groups_rates_schedules_and_closures_of_as_torch() -> None:
    torch.manual_seed(0)
    learned = mf.LSTMOptimizer(3).double()
    a, b, idle = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (2, 3, 4))
    before = [p.detach().clone() for p in (a, b, idle)]
    optimizer = learned.as_torch([{"params": [a, idle]}, {"params": b, "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before[0].square().sum() + before[1].square().sum()
    assert seen == [True]
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])
    assert torch.equal(idle, before[2])
    for p, old, lr in ((a, before[0], 0.1), (b, before[1], 0.5)):
        updates, _ = learned(2 * old, learned.init(old.numel()))
        assert relative_error(p, old - lr * updates) <= 1e-12
    half = b.detach().clone()
    closure()
    carried = optimizer.state[b]["state"]
    optimizer.step()
    updates, _ = learned(2 * half, carried)
    assert relative_error(b, half - 0.05 * updates) <= 1e-12


def test_as_torch_of_gradients_that_are_not_contiguous() -> None:
    learned, wide = make("lstm"), torch.randn(6, 5, dtype=torch.float64)
    for p in (nn.Parameter(wide.t()), nn.Parameter(wide[::2, 1:4].clone())):
        p.grad = torch.randn(p.shape[::-1], dtype=torch.float64).t()
        wanted = p.detach() - 0.1 * learned(p.grad.flatten(), learned.init(p.numel()))[0].view(p.shape)
        learned.as_torch([p], lr=0.1).step()
        torch.testing.assert_close(p.detach(), wanted.detach(), rtol=1e-14, atol=1e-15)


def test_descent_on_an_ordinary_network() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")

    def loss() -> float:
        return nn.functional.cross_entropy(model(episodes.support_x[0]), episodes.support_y[0]).item()

    before = loss()
    descend(model, mf.LSTMOptimizer().double().start_as_descent().as_torch(model.parameters(), lr=0.5), episodes, 20)
    assert loss() < 0.2 * before


def test_arguments_of_as_torch() -> None:
    learned, p = mf.LSTMOptimizer(3).double(), nn.Parameter(torch.ones(2).double())
    for lr in (-1.0, float("nan"), "0.1"):
        with pytest.raises((TypeError, ValueError), match="^lr: expected"):
            learned.as_torch([p], lr=lr)
    with pytest.raises(ValueError, match="^lr: expected"):
        learned.as_torch([{"params": p, "lr": -1.0}])
    with pytest.raises(TypeError, match="^params: expected dtype torch.float64, that of the learned optimiser"):
        learned.as_torch([nn.Parameter(torch.ones(2))])
    optimizer = learned.as_torch([p])
    with pytest.raises(TypeError, match="^params: expected dtype"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(4, 2, sparse=True).double()
    table(torch.tensor([1])).sum().backward()
    p.grad = torch.ones(2).double()
    optimizer = learned.as_torch([p, table.weight])
    with pytest.raises(TypeError, match="^params: expected dense gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2).double())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 0},
        {"layers": 0},
        {"hidden": 2.0},
        {"p": 0.0},
        {"momenta": 0.9},
        {"momenta": "ab"},
        {"momenta": (1.0,)},
    ],
)
def test_arguments_of_the_mlp_optimizer(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        mf.MLPOptimizer(**change)


def test_shapes_that_the_mlp_does_not_take() -> None:
    optimizer = mf.MLPOptimizer(3, momenta=(0.9,))
    with pytest.raises(ValueError, match=r"^grads: expected shape \(N,\)"):
        optimizer(torch.ones(2, 3), optimizer.init(6))
    with pytest.raises(ValueError, match=r"^state: expected shape \(1, 3\)"):
        optimizer(torch.ones(3), torch.zeros(1, 1))
