"""Fewer tasks than threads: a task's layers are cut into parts, and the bits stay those of one thread."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metafast as mf
from tests.backends import native, on_dtypes
from tests.engine.test_layers import BAR
from tests.nets import gradient, relative_error


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every way in which a layer is shared, and layers between them that are not."""
    torch.manual_seed(0)
    return {
        "conv4": (mf.models.Conv4(5, 33, image_size=20), (1, 20, 20)),
        "strided": (
            nn.Sequential(
                nn.Conv2d(3, 37, 5, stride=2, padding=2),
                nn.ELU(),
                nn.Conv2d(37, 21, 3),
                nn.BatchNorm2d(21),
                nn.Tanh(),
                nn.MaxPool2d(3, 2),
                nn.Conv2d(21, 19, 1, bias=False),
                nn.GroupNorm(1, 19),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(19, 5),
            ),
            (3, 31, 29),
        ),
        "wide": (
            nn.Sequential(nn.Linear(203, 301), nn.BatchNorm1d(301), nn.GELU(), nn.Linear(301, 259), nn.Linear(259, 5)),
            (203,),
        ),
    }


def episodes_of(shape: tuple[int, ...], tasks: int, dtype: torch.dtype) -> mf.Episodes:
    torch.manual_seed(1)
    x = torch.randn(tasks, 45, *shape, dtype=dtype)
    y = torch.randint(5, (tasks, 45))
    return mf.Episodes(x[:, :19], y[:, :19], x[:, 19:], y[:, 19:])


@native
@on_dtypes
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", list(nets()))
def test_the_same_bits_with_any_number_of_threads(name: str, tasks: int, dtype: torch.dtype) -> None:
    model, shape = nets()[name]
    model, episodes = model.to(dtype), episodes_of(shape, tasks, dtype)
    maml = mf.MAML(model, lr=0.05, steps=2)
    found = {}
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        model.zero_grad()
        with mf.use_backend("cpu"):
            out = maml.accumulate_grad(episodes)
            adapted = maml.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
            engine = maml._engines(episodes.support_x, episodes.support_y)
        found[threads] = (gradient(model), out.logits, out.losses, adapted)
        shared = engine.network.engine.shares_tasks(tasks, 26, threads)
        assert shared == (threads * 3 >= tasks * 4), "or this tests nothing"
    for threads, results in found.items():
        for result, wanted in zip(results, found[1]):
            assert torch.equal(result, wanted), threads
    if dtype == torch.float64:
        plain = copy.deepcopy(model)
        plain.zero_grad()
        mf.reference.maml(plain, episodes, lr=0.05, steps=2).loss.backward()
        assert relative_error(found[1][0], gradient(plain)) < BAR


@native
def test_small_layers_stay_whole() -> None:
    """Handing out parts of a few microseconds' work would cost more than it saves."""
    maml = mf.MAML(mf.models.MLP(1, (40, 40), 1), loss="mse")
    episodes = mf.data.Sinusoid().sample(tasks=1, shots=10, queries=10)
    with mf.use_backend("cpu"):
        engine = maml._engines(episodes.support_x, episodes.support_y)
    assert not engine.network.engine.shares_tasks(1, 10, 2)
