"""What training code does to learners: copies, state dicts, clipping, schedules, accumulation, data loaders."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

import metafast as mf
from tests.nets import build, episodes_for, gradient, relative_error


def meta_sgd() -> mf.GradientLearner:
    model = build("batch_norm")
    return mf.GradientLearner(model, mf.LearnedRates(model, 0.1), steps=2)


def mamlpp() -> mf.GradientLearner:
    model = build("batch_norm")
    rule = mf.StepNorms(mf.LayerRates(model, 2, 0.1), model, 2)
    return mf.GradientLearner(model, rule, steps=2, query_weights=(0.5, 0.5))


LEARNERS: dict[str, Callable[[], Any]] = {
    "maml": lambda: mf.MAML(build("mlp"), lr=0.1, steps=2),
    "anil": lambda: mf.MAML(build("mlp"), lr=0.1, steps=2, adapts=["4"]),
    "meta_sgd": meta_sgd,
    "mamlpp": mamlpp,
    "lomaml": lambda: mf.LOMAML(build("mlp"), mf.LSTMOptimizer(hidden=3).double(), lr=0.1, steps=2),
    "protonets": lambda: mf.ProtoNets(build("mlp")),
    "reptile": lambda: mf.Reptile(build("mlp"), lr=0.1, steps=2),
    "cavia": lambda: mf.CAVIA(build("mlp"), lr=0.1, steps=2, context=["0.bias"]),
    "protomaml": lambda: mf.ProtoMAML(build("mlp"), 3, 3, lr=0.1, steps=2),
}


def every_learner(test: Any) -> Any:
    """On every backend but the emulator, whose kernels see nothing of this."""
    marks = (pytest.mark.not_emulated, pytest.mark.usefixtures("backend"), pytest.mark.parametrize("kind", LEARNERS))
    for mark in marks:
        test = mark(test)
    return test


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return LEARNERS[kind]()


def torch_saved(learner: Any) -> Any:
    file = io.BytesIO()
    torch.save(learner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it)), torch_saved])
@pytest.mark.parametrize("used", [False, True])
@every_learner
def test_copies_are_the_same_and_apart(kind: str, used: bool, again: Callable[[Any], Any]) -> None:
    learner, episodes = made(kind), episodes_for("mlp")
    if used:  # with all that a learner remembers of its calls
        learner(episodes).loss.backward()
        learner.zero_grad()
    twin = again(learner)
    assert list(twin.state_dict()) == list(learner.state_dict())
    out = learner(episodes)
    other = twin(episodes)
    assert torch.equal(other.losses, out.losses) and torch.equal(other.logits, out.logits)
    other.loss.backward()
    assert all(p.grad is None for p in learner.parameters())
    out.loss.backward()
    assert torch.equal(gradient(twin), gradient(learner))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(learner(episodes).losses, out.losses) and not torch.equal(twin(episodes).losses, out.losses)


@every_learner
def test_state_dicts_go_through_a_file(kind: str) -> None:
    learner, episodes = made(kind), episodes_for("mlp")
    outer = torch.optim.Adam(learner.parameters(), 1e-2)
    for _ in range(2):
        outer.zero_grad()
        learner.accumulate_grad(episodes)
        outer.step()
    file = io.BytesIO()
    torch.save({"learner": learner.state_dict(), "outer": outer.state_dict()}, file)
    file.seek(0)
    other = made(kind)
    assert not torch.equal(other(episodes).losses, learner(episodes).losses)
    outer_again = torch.optim.Adam(other.parameters(), 1.0)
    stored = torch.load(file, weights_only=True)
    other.load_state_dict(stored["learner"])
    outer_again.load_state_dict(stored["outer"])
    for it, optimizer in ((learner, outer), (other, outer_again)):
        it.zero_grad()
        it.accumulate_grad(episodes)
        optimizer.step()
    assert torch.equal(other(episodes).losses, learner(episodes).losses)


@every_learner
def test_clipping_and_schedules_are_the_optimizers_own(kind: str) -> None:
    """Three clipped and scheduled steps through both doors, against the same by hand."""
    doors, episodes = [made(kind), made(kind)], episodes_for("mlp")
    by_hand = made(kind)
    for door, learner in enumerate(doors):
        outer = torch.optim.SGD(learner.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(outer, 1, gamma=0.1)
        for _ in range(3):
            outer.zero_grad()
            if door:
                learner.accumulate_grad(episodes)
            else:
                learner(episodes).loss.backward()
            assert float(torch.nn.utils.clip_grad_norm_(learner.parameters(), 1e-3)) > 1e-3
            assert abs(float(gradient(learner).norm()) - 1e-3) <= 1e-6  # clip_grad_norm_ adds as much to the norm
            outer.step()
            schedule.step()
    for k in range(3):
        learned = list(by_hand.parameters())
        grads = torch.autograd.grad(by_hand(episodes).loss, learned, allow_unused=True)
        norm = torch.cat([g.reshape(-1) for g in grads if g is not None]).norm()
        with torch.no_grad():
            for p, g in zip(learned, grads):
                if g is not None:
                    p.sub_(0.5 * 0.1**k * 1e-3 / (norm + 1e-6) * g)
    wanted = nn.utils.parameters_to_vector(by_hand.parameters())
    for learner in doors:
        assert relative_error(nn.utils.parameters_to_vector(learner.parameters()), wanted) <= 1e-12


@every_learner
def test_gradients_accumulate(kind: str) -> None:
    """A batch in parts with the parts' weights is the whole batch, whichever door a part goes through."""
    learner, episodes = made(kind), episodes_for("mlp", tasks=5)
    learner(episodes).loss.backward()
    whole = gradient(learner)
    for to_none in (True, False):
        learner.zero_grad(set_to_none=to_none)
        for number, part in enumerate((episodes[:2], episodes[2:3], episodes[3:])):
            weights = torch.full((part.tasks,), 1 / 5, dtype=torch.float64)
            if number % 2:
                learner(part, weights).loss.backward()
            else:
                learner.accumulate_grad(part, weights)
        assert relative_error(gradient(learner), whole) <= 1e-12
    learner.zero_grad()
    (learner(episodes).loss / 4).backward()
    assert relative_error(gradient(learner), whole / 4) <= 1e-12


def table() -> Any:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mf.data.from_dataset(TensorDataset(x, torch.arange(40) % 5))


class Batches(Dataset[mf.Episodes]):
    """Batch number i of episodes, whichever process makes it."""

    def __init__(self) -> None:
        self.table = table()

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> mf.Episodes:
        generator = torch.Generator().manual_seed(index)
        return self.table.sample(3, 3, 2, 4, generator, dtype=torch.float64)


class Stream(IterableDataset[mf.Episodes]):
    """Two batches from each worker, by torch's own generator, which the loader seeds for each."""

    def __init__(self) -> None:
        self.table = table()

    def __iter__(self) -> Any:
        assert get_worker_info() is not None
        for _ in range(2):
            yield self.table.sample(3, 3, 2, 4, dtype=torch.float64)


# Python 3.12 and later warn of any fork of a process with threads, which torch's has.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(("start", "workers"), [pytest.param("fork", 2, marks=forks), ("spawn", 1)])
def test_data_loaders_workers(start: str, workers: int) -> None:
    """Episodes come from worker processes to the same bits, and a learner trains on them meanwhile."""
    torch.set_num_threads(2)  # a pool of them is there before the fork
    maml, wanted = made("maml"), list(DataLoader(Batches(), batch_size=None))
    maml.accumulate_grad(wanted[0])
    found = []
    context = multiprocessing.get_context(start)
    for episodes in DataLoader(Batches(), batch_size=None, num_workers=workers, multiprocessing_context=context):
        assert isinstance(episodes, mf.Episodes)
        maml.accumulate_grad(episodes)
        found.append(episodes)
    assert len(found) == len(wanted) == 5
    for one, other in zip(found, wanted):
        for part in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(getattr(one, part), getattr(other, part))
    again = made("maml")
    for episodes in (wanted[0], *wanted):
        again.accumulate_grad(episodes)
    assert torch.equal(gradient(maml), gradient(again))


@forks
def test_workers_draw_different_episodes() -> None:
    context = multiprocessing.get_context("fork")
    batches = list(DataLoader(Stream(), batch_size=None, num_workers=2, multiprocessing_context=context))
    assert len(batches) == 4
    for i, one in enumerate(batches):
        assert not any(torch.equal(one.support_x, other.support_x) for other in batches[:i])
