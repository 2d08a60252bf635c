"""Meta-steps of one inner step, in which wide linear layers' weights are never a task's own (csrc/cpu/one_step.h)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import native, on_dtypes
from tests.nets import both_doors, gradient, relative_error

BAR = 1e-10
FEATURES = 19


@pytest.fixture(autouse=True)
def native_backend() -> object:
    with mf.use_backend("cpu"):
        yield


class TwoHeads(nn.Module):
    """A value that three layers read, so that gradients of wide layers add up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(FEATURES, 37), nn.Linear(37, 41), nn.Linear(37, 41)
        self.norm, self.head = nn.LayerNorm(41), nn.Linear(41, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(self.norm(torch.tanh(self.left(h)) + self.right(h)))


def net(name: str, outputs: int) -> nn.Module:
    def chain(*widths: int, bias: bool = True, between: Any = (nn.ReLU,)) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in zip((FEATURES, *widths), (*widths, outputs)):
            layers += [nn.Linear(before, after, bias), *(kind() for kind in between)]
        return nn.Sequential(*layers[: -len(between)])

    def batch_norm(affine: bool) -> Any:
        return lambda: nn.LazyBatchNorm1d(affine=affine)

    nets = {
        "relu": lambda: chain(40, 40),  # whole vectors, of AVX-512 and a half
        "relu, primes": lambda: chain(37, 53),
        "no bias": lambda: chain(33, 47, bias=False),
        "sigmoid": lambda: chain(31, 33, between=(nn.Sigmoid,)),  # not 0 in lanes that are padding
        "gelu": lambda: chain(33, 31, between=(nn.GELU,)),
        "softplus after identity": lambda: chain(39, 39, between=(nn.Identity, nn.Softplus)),
        "batch norm": lambda: chain(40, 33, between=(batch_norm(True), nn.ReLU)),  # fused
        "batch norm, tanh": lambda: chain(40, 33, between=(batch_norm(True), nn.Tanh)),
        "batch norm without parameters": lambda: chain(40, 33, between=(batch_norm(False), nn.Tanh)),
        "layer norm": lambda: nn.Sequential(chain(40), nn.Tanh(), nn.LayerNorm(outputs), nn.Linear(outputs, outputs)),
        "one wide layer": lambda: chain(61),
        "image": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 1, FEATURES)), nn.AvgPool2d((1, 3), 2), nn.Flatten(), nn.Linear(9, 80), nn.Tanh(),
            nn.Linear(80, 35), nn.ReLU(), nn.Linear(35, outputs),
        ),
        "two heads": TwoHeads,
    }  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = nets[name]().double()
    model(torch.randn(3, FEATURES, dtype=torch.float64))  # lazy layers get their sizes
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.3)
    return model


NETS = (
    "relu", "relu, primes", "no bias", "sigmoid", "gelu", "softplus after identity", "batch norm", "batch norm, tanh",
    "batch norm without parameters", "layer norm", "one wide layer", "image", "two heads",
)  # fmt: skip


def episodes_of(tasks: int, supports: int, queries: int, outputs: int, loss: str) -> mf.Episodes:
    generator = torch.Generator().manual_seed(tasks)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, samples, FEATURES, generator=generator, dtype=torch.float64)
        if loss == "mse":
            return x, torch.randn(tasks, samples, outputs, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, outputs, (tasks, samples), generator=generator)

    return mf.Episodes(*side(supports), *side(queries))


def together(maml: mf.MAML, episodes: mf.Episodes) -> int:
    engine = maml._engines(episodes.support_x, episodes.support_y).network.engine
    found: int = engine.together(episodes.tasks, episodes.support_x.shape[1], episodes.query_x.shape[1])
    return found


@native
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("tasks", "supports", "queries"), [(1, 10, 10), (17, 5, 7), (25, 10, 10), (33, 3, 2), (35, 17, 2), (3, 1, 5)]
)
def test_exact(name: str, tasks: int, supports: int, queries: int) -> None:
    if supports == 1 and name.startswith("batch norm"):
        supports = 2  # or torch refuses it
    for outputs, loss, first_order in ((5, "cross_entropy", False), (2, "mse", False), (5, "mse", True)):
        if name in ("layer norm", "two heads"):
            outputs = 5
        model = net(name, outputs)
        plain = copy.deepcopy(model)
        episodes = episodes_of(tasks, supports, queries, outputs, loss)
        maml = mf.MAML(model, lr=0.2, steps=1, loss=loss, first_order=first_order)
        assert together(maml, episodes) == min(-(-tasks // 8), 4), "or this tests nothing"
        weights = torch.rand(tasks, dtype=torch.float64) if tasks == 17 else None
        out, found = both_doors(maml, episodes, weights)
        wanted = mf.reference.maml(
            plain, episodes, lr=0.2, steps=1, loss=loss, first_order=first_order, weights=weights
        )
        wanted.loss.backward()
        assert relative_error(found, gradient(plain)) <= BAR
        assert relative_error(out.logits, wanted.logits) <= BAR
        assert relative_error(out.losses, wanted.losses) <= BAR
        if loss == "cross_entropy":
            assert torch.equal(out.accuracy, wanted.accuracy)
        with torch.no_grad():
            judged = maml(episodes, weights)
        assert torch.equal(judged.logits, out.logits) and torch.equal(judged.losses, out.losses)


@native
@pytest.mark.parametrize("name", ["relu", "batch norm", "two heads"])
def test_any_cotangent(name: str) -> None:
    """Tasks' losses one by one and logits: there, each task's gradient is its own."""
    model = net(name, 5)
    plain = copy.deepcopy(model)
    episodes = episodes_of(18, 6, 7, 5, "cross_entropy")

    def value(out: Any) -> Tensor:
        return out.losses.sin().sum() + 0.3 * out.logits.tanh().sum() + 2 * out.loss

    maml = mf.MAML(model, lr=0.2, steps=1)
    assert together(maml, episodes) == 3
    value(mf.reference.maml(plain, episodes, lr=0.2, steps=1)).backward()
    for _ in range(2):
        model.zero_grad()
        value(maml(episodes)).backward()
        assert relative_error(gradient(model), gradient(plain)) <= BAR
    # Now that they are kept, sums come from them.
    model.zero_grad()
    plain.zero_grad()
    mf.reference.maml(plain, episodes, lr=0.2, steps=1).loss.backward()
    assert relative_error(both_doors(maml, episodes)[1], gradient(plain)) <= BAR


@native
@on_dtypes
@pytest.mark.parametrize("tasks", [1, 15, 16, 41])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "batch norm", "wide"])
def test_the_same_bits_with_any_number_of_threads(name: str, tasks: int, dtype: torch.dtype) -> None:
    if name == "wide":  # so that few tasks are shared by all threads
        model: nn.Module = nn.Sequential(nn.Linear(FEATURES, 320), nn.ReLU(), nn.Linear(320, 300), nn.Tanh()).to(dtype)
        model = nn.Sequential(model, nn.Linear(300, 5).to(dtype))
    else:
        model = net(name, 5).to(dtype)
    episodes = episodes_of(tasks, 7, 12, 5, "cross_entropy").to(dtype=dtype)
    maml = mf.MAML(model, lr=0.2, steps=1)
    assert together(maml, episodes) == min(-(-tasks // 8), 4)
    found = {}
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        out, taken = both_doors(maml, episodes)
        found[threads] = (taken, out.logits, out.losses)
    for results in found.values():
        assert all(torch.equal(a, b) for a, b in zip(results, found[1]))


@native
@pytest.mark.parametrize("tasks", [40, 131])
def test_groups_of_tasks_that_take_several_turns(tasks: int) -> None:
    """No more than 32 rows of gradients, whether a thread has a group or all threads share the tasks in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 40), nn.Tanh(), nn.Linear(40, 5)).double()
    plain, episodes = copy.deepcopy(model), episodes_of(tasks, 1600, 3, 5, "cross_entropy")
    maml = mf.MAML(model, lr=0.2, steps=1)
    assert together(maml, episodes) == 4
    mf.reference.maml(plain, episodes, lr=0.2, steps=1).loss.backward()
    engine, found = maml._engines(episodes.support_x, episodes.support_y).network.engine, []
    for threads in (2, 4 * tasks // 3 + 1):
        torch.set_num_threads(threads)
        assert engine.shares_tasks(tasks, 1600, threads) == (threads > 2), "or this tests nothing"
        out, taken = both_doors(maml, episodes)
        found.append(taken)
        with torch.no_grad():  # without gradients there are no rows to be few
            assert torch.equal(maml(episodes).losses, out.losses)
    assert torch.equal(found[0], found[1])
    assert relative_error(found[0], gradient(plain)) <= BAR


@native
@pytest.mark.parametrize("name", ["relu", "batch norm, tanh", "gelu"])
def test_a_tasks_results_do_not_depend_on_its_neighbours(name: str) -> None:
    """However many go together: logits and losses are those of the task alone, and NaN stays where it is."""
    model = net(name, 5)
    episodes = episodes_of(34, 6, 7, 5, "cross_entropy")
    maml = mf.MAML(model, lr=0.2, steps=1)
    assert together(maml, episodes) == 4 and together(maml, episodes[3]) == 1
    with torch.no_grad():
        whole = maml(episodes)
        for task in (0, 3, 7, 33):
            alone = maml(episodes[task])
            assert torch.equal(alone.logits[0], whole.logits[task])
            assert torch.equal(alone.losses[0], whole.losses[task])
        episodes.support_x[5] *= 1e200  # overflows
        broken = maml(episodes)
    assert broken.losses[5].isnan()
    others = [task for task in range(34) if task != 5]
    assert torch.equal(broken.logits[others], whole.logits[others])


@native
def test_float32_errs_as_much_as_autograd_does() -> None:
    model = net("gelu", 5)
    episodes = episodes_of(25, 10, 10, 5, "cross_entropy")
    exact = copy.deepcopy(model)
    mf.reference.maml(exact, episodes, lr=0.2, steps=1).loss.backward()
    single, plain = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    rounded = episodes.to(dtype=torch.float32)
    _, found = both_doors(mf.MAML(single, lr=0.2, steps=1), rounded)
    mf.reference.maml(plain, rounded, lr=0.2, steps=1).loss.backward()
    wanted = gradient(exact)
    assert relative_error(found.double(), wanted) <= 2 * relative_error(gradient(plain).double(), wanted) + 1e-6


@native
def test_where_it_is_for() -> None:
    """Layers that are wider than a task has samples."""
    episodes = episodes_of(25, 10, 10, 5, "cross_entropy")
    assert together(mf.MAML(net("relu", 5), steps=1), episodes) == 4
    assert together(mf.MAML(net("relu", 5), steps=1), episodes_of(25, 10, 90, 5, "cross_entropy")) == 0
    narrow = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, 5)).double()
    assert together(mf.MAML(narrow, steps=1), episodes) == 0


@native
def test_what_explain_says_of_memory() -> None:
    """A thread's workspace for one step, of tasks together, has no tape and does not grow with the tasks."""
    model = net("relu", 5)
    episodes = episodes_of(25, 10, 10, 5, "cross_entropy")
    engine = mf.MAML(model, steps=1)._engines(episodes.support_x, episodes.support_y).network.engine
    (one, its_tape), (two, their_tape) = (engine.workspace(10, 10, steps) for steps in (1, 2))
    assert its_tape == 0 < their_tape and one < 8 * two
