"""The fused meta-step of small networks, the kernel alone, against the reference loop in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.reference import maml
from tests.backends import GPUS, device_of, in_every_order, kernels_of, poisoned
from tests.nets import relative_error

on_gpus = pytest.mark.parametrize("backend", [pytest.param(name, marks=kernels_of(name)) for name in GPUS])
LR, STEPS = 0.3, 3


def chain(widths: tuple[int, ...], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def episodes_of(widths: tuple[int, ...], loss: str, tasks: int, shots: int, queries: int) -> mf.Episodes:
    def labels(count: int) -> Tensor:
        if loss == "cross_entropy":
            return torch.randint(widths[-1], (tasks, count))
        return torch.randn(tasks, count, widths[-1])

    return mf.Episodes(
        torch.randn(tasks, shots, widths[0]), labels(shots), torch.randn(tasks, queries, widths[0]), labels(queries)
    )


def problem(
    widths: tuple[int, ...], activation: str, loss: str, tasks: int, shots: int, queries: int, dtype: torch.dtype
) -> tuple[nn.Sequential, mf.Episodes, Tensor]:
    torch.manual_seed(sum(widths))
    model = chain(widths, activation).to(dtype)
    e = episodes_of(widths, loss, tasks, shots, queries)
    weights = torch.linspace(0.5, 1.5, tasks, dtype=dtype)
    y = (e.support_y, e.query_y) if loss == "cross_entropy" else (e.support_y.to(dtype), e.query_y.to(dtype))
    return model, mf.Episodes(e.support_x.to(dtype), y[0], e.query_x.to(dtype), y[1]), weights


def fused(
    backend: str, model: nn.Sequential, e: mf.Episodes, weights: Tensor, loss: str, steps: int, first_order: bool
) -> list[Tensor]:
    linears = [m for m in model if isinstance(m, nn.Linear)]
    widths = [linears[0].in_features, *(m.out_features for m in linears)]
    activation = "tanh" if any(isinstance(m, nn.Tanh) for m in model) else "relu"
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    x, y, qx, qy = (t.to(device_of(backend)) for t in (e.support_x, e.support_y, e.query_x, e.query_y))
    op = torch.ops.metafast.mlp_meta_step
    rest = (x, y, qx, qy, LR, steps, first_order, weights.to(x.device))
    with poisoned():
        found = in_every_order(backend, lambda: list(op(theta.to(x.device), widths, activation, loss, *rest)))
    return [t.cpu() for t in found]


def plain(
    model: nn.Sequential, e: mf.Episodes, weights: Tensor, loss: str, steps: int, first_order: bool
) -> list[Tensor]:
    """Losses, logits, each task's gradient and their weighted sum, by the reference."""
    params = list(model.parameters())
    out = maml(model, e, lr=LR, steps=steps, loss=loss, first_order=first_order)
    grads = [torch.autograd.grad(one, params, retain_graph=True) for one in out.losses]
    rows = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
    return [out.losses.detach(), out.logits.detach(), rows, weights @ rows]


# One layer, odd widths, as many layers as there may be, more outputs than a block has threads, and the sinusoid's.
CASES = [
    ((3, 4), 2, 5, 3),
    ((1, 1, 1), 1, 1, 1),
    ((5, 7, 3), 3, 2, 9),
    ((2, 33, 17, 5), 2, 11, 4),
    ((1, 2, 3, 4, 5, 4, 3, 2, 2), 2, 3, 3),
    ((1, 40, 40, 1), 1, 10, 10),
]


@on_gpus
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("widths", "tasks", "shots", "queries"), CASES)
def test_against_the_reference(
    widths: tuple[int, ...],
    tasks: int,
    shots: int,
    queries: int,
    activation: str,
    loss: str,
    first_order: bool,
    backend: str,
) -> None:
    for steps in (0, 1, STEPS) if len(widths) == 3 else (STEPS,):
        model, e, weights = problem(widths, activation, loss, tasks, shots, queries, torch.float64)
        wanted = plain(model, e, weights, loss, steps, first_order)
        for mine, exact in zip(fused(backend, model, e, weights, loss, steps, first_order), wanted, strict=True):
            if loss == "cross_entropy" and widths[-1] == 1:
                assert float((mine - exact).norm()) <= 1e-12  # of one class all is 0, but the logits
            else:
                assert relative_error(mine, exact) <= 1e-10


@on_gpus
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_float32_errs_at_most_twice_as_much_as_torch(activation: str, loss: str, backend: str) -> None:
    single, e, weights = problem((3, 20, 20, 5), activation, loss, 2, 10, 10, torch.float32)
    double = chain((3, 20, 20, 5), activation).double()
    double.load_state_dict(single.state_dict())
    y = (e.support_y, e.query_y) if loss == "cross_entropy" else (e.support_y.double(), e.query_y.double())
    wide = mf.Episodes(e.support_x.double(), y[0], e.query_x.double(), y[1])
    exact = plain(double, wide, weights.double(), loss, STEPS, False)
    torchs = plain(single, e, weights, loss, STEPS, False)
    for mine, theirs, wanted in zip(fused(backend, single, e, weights, loss, STEPS, False), torchs, exact, strict=True):
        assert relative_error(mine, wanted) <= 2 * relative_error(theirs, wanted) + 1e-6


@on_gpus
def test_what_does_not_fit(backend: str) -> None:
    _, e, weights = problem((3, 4, 2), "relu", "cross_entropy", 2, 5, 5, torch.float64)
    sets = [t.to(device_of(backend)) for t in (e.support_x, e.support_y, e.query_x, e.query_y)]
    where, op = {"dtype": torch.float64, "device": device_of(backend)}, torch.ops.metafast.mlp_meta_step
    weights, theta = weights.to(where["device"]), torch.zeros(26, **where)
    with pytest.raises(ValueError, match=r"^theta: expected shape \[26\], got \[25\]"):
        op(theta[1:], [3, 4, 2], "relu", "cross_entropy", *sets, LR, 1, False, weights)
    with pytest.raises(ValueError, match="^activation: expected 'relu' or 'tanh', got 'gelu'"):
        op(theta, [3, 4, 2], "gelu", "cross_entropy", *sets, LR, 1, False, weights)
    with pytest.raises(ValueError, match=r"^support_y: expected labels 0\.\.1, got 2"):
        op(theta, [3, 4, 2], "relu", "cross_entropy", sets[0], sets[1] + 2, *sets[2:], LR, 1, False, weights)
    with pytest.raises(TypeError, match="^query_x: expected dtype Double, got Float"):
        op(theta, [3, 4, 2], "relu", "cross_entropy", *sets[:2], sets[2].float(), sets[3], LR, 1, False, weights)
    large = torch.zeros(4 * 4000 + 4001 * 2, **where)
    with pytest.raises(ValueError, match="expected a task that fits into a block's shared memory, got one of [0-9]+"):
        op(large, [3, 4000, 2], "relu", "cross_entropy", *sets, LR, 1, False, weights)
